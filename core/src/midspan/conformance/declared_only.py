"""Proxies that hand on what the interface declares, and remember who asked for anything else.

Put between the core and a device, they find out whether the core uses more of it than a plugin was
told to bring. Knows the interface's protocols by their annotations, and no device.

Invariants: an undeclared name is an ``AttributeError``, as it is with a device that has just what
is declared, and is remembered even where the error is swallowed; what a device is given back is
what it gave out, never a proxy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import get_annotations
from typing import Any, cast

from midspan.interface import Cache, Collectives, Device, Program, StepOutput
from midspan.interface.device import GroupDevice

_INNER, _KIND, _LOG = "_DeclaredOnly__inner", "_DeclaredOnly__kind", "_DeclaredOnly__log"

KINDS: dict[str, type] = {
    "Device": GroupDevice,
    "Program": Program,
    "Cache": Cache,
    "StepOutput": StepOutput,
    "Collectives": Collectives,
}
"""Name of an object's protocol -> where its names are declared."""
RETURNED: dict[tuple[str, str], str] = {
    ("Device", "compile"): "Program",
    ("Device", "allocate_cache"): "Cache",
    ("Device", "join"): "Collectives",
    ("Program", "run"): "StepOutput",
}
"""(kind, method) -> the kind of what it returns, where that is no plain data."""


@cache
def declared_names(kind: str) -> frozenset[str]:
    """Names that a protocol declares, those of its bases included."""
    names: set[str] = set()
    for base in KINDS[kind].__mro__:
        if base.__module__.startswith("midspan."):
            names |= {name for name in (*vars(base), *get_annotations(base)) if name[:1] != "_"}
    return frozenset(names)


class UseLog:
    """What was asked for beyond what is declared.

    Attributes:
        undeclared: ``Kind.name``, in the order in which they were first asked for.
        used: the same for declared names.
    """

    def __init__(self) -> None:
        self.undeclared: list[str] = []
        self.used: set[str] = set()

    def wrap_device(self, device: Device) -> Device:
        """A device of which only declared names can be used."""
        return cast(Device, DeclaredOnly(device, "Device", self))

    def note(self, kind: str, name: str, *, declared: bool) -> None:
        """Remember a use."""
        text = f"{kind}.{name}"
        if declared:
            self.used.add(text)
        elif text not in self.undeclared:
            self.undeclared.append(text)


class DeclaredOnly:
    """One object of a plugin's, seen through its protocol.

    Args:
        inner: the object.
        kind: of ``KINDS``.
        log: where uses are remembered.
    """

    def __init__(self, inner: object, kind: str, log: UseLog) -> None:
        object.__setattr__(self, _INNER, inner)
        object.__setattr__(self, _KIND, kind)
        object.__setattr__(self, _LOG, log)

    def __getattr__(self, name: str) -> Any:
        inner, kind, log = _parts(self)
        declared = name in declared_names(kind)
        if not (name.startswith("__") and name.endswith("__")):
            log.note(kind, name, declared=declared)
        if not declared:
            raise AttributeError(f"the interface declares no {kind}.{name}")
        value = getattr(inner, name)
        return _handing_on(value, RETURNED.get((kind, name)), log) if callable(value) else value

    def __setattr__(self, name: str, value: object) -> None:
        _, kind, log = _parts(self)
        log.note(kind, f"{name} (set)", declared=False)
        raise AttributeError(f"the core must not set {kind}.{name}")


def _parts(proxy: DeclaredOnly) -> tuple[object, str, UseLog]:
    return (
        object.__getattribute__(proxy, _INNER),
        object.__getattribute__(proxy, _KIND),
        object.__getattribute__(proxy, _LOG),
    )


def _handing_on(method: Callable[..., Any], returns: str | None, log: UseLog) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        given = [_parts(item)[0] if isinstance(item, DeclaredOnly) else item for item in arguments]
        by_name = {key: _parts(item)[0] if isinstance(item, DeclaredOnly) else item for key, item in named.items()}
        result = method(*given, **by_name)
        return result if returns is None else DeclaredOnly(result, returns, log)

    return call
