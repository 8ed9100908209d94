"""The options that ``--device-option key=value`` may set, each a record with its meaning.

A feature that no option switches on is not claimed. ``docs/simulated-devices.md`` has the same
table, and a test holds one against the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from midspan.errors import SettingsError
from midspan.interface.operations import OPERATIONS
from midspan.runtimes.reference.cached_rows import CACHE_TYPES
from midspan.runtimes.reference.element_types import ELEMENT_TYPES
from midspan_simulated.fault_plan import FAULTS, Fault, read_faults
from midspan_simulated.stored_weights import STORED_FORMATS

QUANTIZATIONS = ("gguf.q8_0",)
"""Packed formats that the device's kernels read."""

LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SimulatedOptions:
    """Options as values; see ``OPTIONS`` for what each is."""

    numerics: bool = True
    memory: int | None = None
    dtypes: tuple[str, ...] = ()
    cache_dtypes: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = ()
    quantizations: tuple[str, ...] = ()
    batch_invariant: bool = False
    deterministic: bool = False
    asynchronous: bool = False
    captures_graphs: bool = False
    world_size: int = 1
    max_logprobs: int = 20
    max_tokens: int | None = None
    max_requests: int | None = None
    max_context: int | None = None
    max_sampled_rows: int | None = None
    refuse: tuple[str, ...] = ()
    fault: tuple[Fault, ...] = ()
    fault_once: str | None = None
    devices: int = 1
    weights: str | None = None
    compute_efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptionRecord:
    """One option.

    Attributes:
        name: the key.
        value: what may be written for it.
        meaning: for people.
        default: what holds without it, for people.
        read: text -> value; raises ``ValueError`` with a reason.
        sheet_only: it is about modelled time, and so means nothing on the plain device.
    """

    name: str
    value: str
    meaning: str
    default: str
    read: Callable[[str], Any]
    sheet_only: bool = False


def read_options(options: Mapping[str, str]) -> SimulatedOptions:
    """Options from their text.

    Raises:
        SettingsError: an unknown key (all are listed), a value that cannot be meant, or two that exclude each other.
    """
    records = {record.name: record for record in OPTIONS}
    values: dict[str, Any] = {}
    for name, text in options.items():
        record = records.get(name)
        if record is None:
            raise SettingsError(f"The simulated device has no option '{name}'.", remedy=f"Its options:\n{help_text()}")
        try:
            values[name] = record.read(text)
        except ValueError as error:
            raise SettingsError(
                f"The simulated device's option {name}={text!r} is wrong: {error}.",
                remedy=f"Write {name}={record.value}: {record.meaning}",
            ) from error
    chosen = SimulatedOptions(**values)
    _check_together(chosen)
    return chosen


def help_text() -> str:
    """All options, one a line."""
    return "\n".join(
        f"  {record.name}={record.value}: {record.meaning} Default: {record.default}." for record in OPTIONS
    )


def refuse_sheet_options(options: SimulatedOptions, device_id: str) -> None:
    """Refuse options about time on a device that has no clock.

    Raises:
        SettingsError: one is set.
    """
    defaults = SimulatedOptions()
    for record in OPTIONS:
        if record.sheet_only and getattr(options, record.name) != getattr(defaults, record.name):
            raise SettingsError(
                f"The option {record.name} is about modelled time, and '{device_id}' has no data sheet.",
                remedy="Take a device with one: midspan devices lists simulated:NAME.",
            )


def _check_together(options: SimulatedOptions) -> None:
    for name in ("devices", "weights"):
        if options.numerics and getattr(options, name) != getattr(SimulatedOptions(), name):
            raise SettingsError(
                f"The option {name} plans for what is not computed, so it needs numerics=off.",
                remedy="Add --device-option numerics=off, or leave it out.",
            )
    if options.fault_once is not None and not options.fault:
        raise SettingsError("fault_once names a file for faults, and no fault is asked for.", remedy="Add fault=...")


def _switch(text: str) -> bool:
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError("it is neither on nor off")
    return words[text.lower()]


def _integer(low: int, high: int = LARGEST) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise ValueError(f"it is no number from {low} to {high}")
        return int(text)

    return read


def _integers(text: str) -> tuple[int, ...]:
    read = _integer(1, 65536)
    return _distinct(tuple(read(part) for part in text.split(",")))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("it is not above 0 and at most 1")
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)(B|KiB|MiB|GiB|TiB|MB|GB|TB)?", text)
    if match is None:
        raise ValueError("it is no number of bytes such as 4GiB")
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    value = int(match[1]) * units.get(match[2] or "B", 1)
    if not 0 < value < 2**60:
        raise ValueError("it is no amount that a device has")
    return value


def _words(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        parts = tuple(text.split(","))
        unknown = [part for part in parts if part not in known]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is none of {', '.join(known)}")
        return _distinct(parts)

    return read


def _word(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"it is none of {', '.join(known)}")
        return text

    return read


def _distinct(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(parts)) != len(parts):
        raise ValueError("something is named twice")
    return parts


def _path(text: str) -> str:
    if not text:
        raise ValueError("it is empty")
    return text


def _option(
    name: str, value: str, default: str, read: Callable[[str], Any], meaning: str, *, sheet_only: bool = False
) -> OptionRecord:
    return OptionRecord(name=name, value=value, meaning=meaning, default=default, read=read, sheet_only=sheet_only)


_TYPES = tuple(ELEMENT_TYPES)
_CACHE_TYPES = tuple(CACHE_TYPES)

OPTIONS: tuple[OptionRecord, ...] = (
    _option("numerics", "on|off", "on", _switch, "Off: no weight is loaded, nothing computed; memory still counts."),
    _option("memory", "SIZE", "the sheet's, or 4GiB", _bytes, "Memory of one device: bytes, or 4GiB, 80GB."),
    _option("dtypes", "TYPE,...", "the sheet's, or float32", _words(_TYPES), "Activation types claimed, in order."),
    _option("cache_dtypes", "TYPE,...", "as dtypes", _words(_CACHE_TYPES), "Cache element types claimed, in order."),
    _option("block_sizes", "N,...", "24,7,16; 16,24,7 with a sheet", _integers, "Tokens per cache block, in order."),
    _option("quantizations", "FORMAT,...", "none", _words(QUANTIZATIONS), "Packed weight formats claimed: gguf.q8_0."),
    _option("batch_invariant", "on|off", "off", _switch, "Claim that neighbours do not change a request's tokens."),
    _option("deterministic", "on|off", "off", _switch, "Claim that the same batch gives the same bits."),
    _option("asynchronous", "on|off", "off", _switch, "Steps run when somebody waits for them, in their order."),
    _option("captures_graphs", "on|off", "off", _switch, "A step is launched once instead of node by node."),
    _option("world_size", "N", "1", _integer(1, 1024), "Devices that may form a group for one model."),
    _option("max_logprobs", "N", "20", _integer(1, 4096), "Most logprobs returned for a row."),
    _option("max_tokens", "N", "no limit", _integer(1), "Claimed limit of tokens in a step."),
    _option("max_requests", "N", "no limit", _integer(1), "Claimed limit of requests in a step."),
    _option("max_context", "N", "no limit", _integer(1), "Claimed limit of tokens of a request."),
    _option("max_sampled_rows", "N", "no limit", _integer(1), "Claimed limit of rows that a step samples."),
    _option("refuse", "OP,...", "none", _words(tuple(OPERATIONS)), "Operations that the device's kernels refuse."),
    _option("fault", "FAULT,...", "none", read_faults, f"Misbehave: {'; '.join(FAULTS.values())}."),
    _option("fault_once", "FILE", "every time", _path, "Faults happen while this file is not there; they make it."),
    _option(
        "devices",
        "N",
        "1",
        _integer(1, 1024),
        "Plan for N devices that split each layer. Needs numerics=off.",
        sheet_only=True,
    ),
    _option(
        "weights",
        "FORMAT",
        "the activation type",
        _word(tuple(STORED_FORMATS)),
        f"How linear weights are stored: {', '.join(STORED_FORMATS)}. Needs numerics=off.",
        sheet_only=True,
    ),
    _option("compute_efficiency", "SHARE", "1", _share, "Share of the peak that products reach.", sheet_only=True),
    _option(
        "bandwidth_efficiency",
        "SHARE",
        "1",
        _share,
        "Share of memory and link bandwidth that is reached.",
        sheet_only=True,
    ),
)
"""Every option, in the order of the documentation."""
