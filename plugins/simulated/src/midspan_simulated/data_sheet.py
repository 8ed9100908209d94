"""What a vendor says about an accelerator, figure by figure.

Knows no model and no time. Every figure is of one device, in bytes, bytes per second and
operations per second, decimal as vendors write them unless they write GiB; a dense product's
peak, never the one that counts zeros left out. What a sheet does not say is None here, and
what is assumed instead is in ``assumptions`` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a figure was found.

    Attributes:
        title: the vendor's document.
        url: its address.
        read: how it was read: at that address, or as another page quotes it.
    """

    title: str
    url: str
    read: str = "there"


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """One accelerator.

    Attributes:
        name: what people write after ``simulated:``.
        product: the vendor's name for it.
        kind: what it is, in a few words.
        memory_bytes: of one device.
        bandwidth: of its memory, bytes per second.
        peaks: element type -> operations per second (a multiplication and an addition are two).
        link_bandwidth: to the other devices of a group, bytes per second in one direction, all
            links of the device together; None: not published.
        compiled_whole: the vendor's software compiles a graph into one program, so that a step is launched once.
        sources: of the figures above; sheets looked at in November 2026.
        assumptions: what no source says, and why it was taken so.
    """

    name: str
    product: str
    kind: str
    memory_bytes: int
    bandwidth: float
    peaks: Mapping[str, float]
    link_bandwidth: float | None
    compiled_whole: bool = False
    sources: tuple[Source, ...]
    assumptions: tuple[str, ...] = ()

    def dtypes(self) -> tuple[str, ...]:
        """Activation types that it computes in, the narrow ones first."""
        return tuple(name for name in ("bfloat16", "float16", "float32") if name in self.peaks)
