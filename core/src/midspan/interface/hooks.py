"""The hooks by which installed packages extend Midspan.

A package names a module in the entry-point group ``midspan.plugins``; the
module implements any of these hooks with ``@hookimpl``. Hooks are called at
start-up only, never in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy

from midspan.interface.plugin import DevicePlugin
from midspan.interface.weights import QuantizationReader

PROJECT = "midspan"
"""The name under which hooks are registered."""

ENTRY_POINT_GROUP = "midspan.plugins"
"""Where packages name the module with their hooks."""

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a hook that the core calls."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a package's implementation of a hook."""


@hookspec
def midspan_devices() -> Sequence[DevicePlugin]:  # type: ignore[empty-body]
    """Kinds of hardware that this package brings."""


@hookspec
def midspan_architectures() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Model architectures: published class name -> builder(config, graph_builder)."""


@hookspec
def midspan_quantizations() -> Mapping[str, QuantizationReader]:  # type: ignore[empty-body]
    """Published quantizations: ``quant_method`` of config.json -> reader(quantization_config, tensors)."""


@hookspec
def midspan_commands(app: Any) -> None:
    """Add commands to the command line; ``app`` is the Typer application."""
