"""How far the fetching of a model is, for whoever shows it to a person."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Union


@dataclass(frozen=True, kw_only=True)
class DownloadProgress:
    """One report.

    Attributes:
        source: what is fetched: the hub name, or the package.
        phase: ``"download"`` or ``"unpack"``; each counts from 0.
        bytes_done: bytes of this phase that are done.
        bytes_total: bytes of this phase, or None while nobody knows.
    """

    source: str
    phase: str
    bytes_done: int
    bytes_total: int | None


Report = Union[Callable[[DownloadProgress], None], None]
"""Who is told; None: nobody."""
