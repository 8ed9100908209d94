"""The options that ``--device-option key=value`` may set for this device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midspan.errors import SettingsError

MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """Options of the device.

    Attributes:
        threads: threads that compute together; None: one for each usable physical core.
    """

    threads: int | None = None


def read_options(options: Mapping[str, str]) -> CpuOptions:
    """Options from their text.

    Raises:
        SettingsError: an unknown key, or a value that cannot be meant.
    """
    unknown = sorted(set(options) - {"threads"})
    if unknown:
        raise SettingsError(f"the cpu device has no option '{unknown[0]}'.", remedy="Its options: threads=NUMBER.")
    text = options.get("threads")
    if text is None:
        return CpuOptions()
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_THREADS:
        raise SettingsError(f"threads={text!r} is not a number from 1 to {MAX_THREADS}.")
    return CpuOptions(threads=int(text))
