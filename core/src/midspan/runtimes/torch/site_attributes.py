"""Typed reading of a node's attributes, for kernels.

Graphs are validated before kernels see them, so a wrong type here is a bug of a
builder or pass that skipped validation, and is said as a ``GraphError``.
"""

from __future__ import annotations

from midspan.errors import GraphError
from midspan.interface.kernel import KernelSite


def integer(site: KernelSite, name: str) -> int:
    """An attribute that is an integer."""
    value = site.node.attributes[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise GraphError(f"attribute '{name}' must be an integer, not {value!r}", node=site.node.name)
    return value


def number(site: KernelSite, name: str) -> float:
    """An attribute that is a number."""
    value = site.node.attributes[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GraphError(f"attribute '{name}' must be a number, not {value!r}", node=site.node.name)
    return float(value)


def optional_number(site: KernelSite, name: str) -> float | None:
    """An attribute that is a number or None."""
    return None if site.node.attributes[name] is None else number(site, name)


def optional_integer(site: KernelSite, name: str) -> int | None:
    """An attribute that is an integer or None."""
    return None if site.node.attributes[name] is None else integer(site, name)


def text(site: KernelSite, name: str) -> str:
    """An attribute that is a string."""
    value = site.node.attributes[name]
    if not isinstance(value, str):
        raise GraphError(f"attribute '{name}' must be a string, not {value!r}", node=site.node.name)
    return value


def numbers(site: KernelSite, name: str) -> tuple[float, ...]:
    """An attribute that is a tuple of numbers."""
    value = site.node.attributes[name]
    if not isinstance(value, tuple) or not all(isinstance(item, (int, float)) for item in value):
        raise GraphError(f"attribute '{name}' must be a tuple of numbers, not {value!r}", node=site.node.name)
    return tuple(float(item) for item in value)


def integers(site: KernelSite, name: str) -> tuple[int, ...]:
    """An attribute that is a tuple of integers."""
    return tuple(int(item) for item in numbers(site, name))
