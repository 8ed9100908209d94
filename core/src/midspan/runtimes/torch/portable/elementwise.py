"""Portable kernels of the operations that work element by element.

Every function takes the torch type's values to float32, computes there and
rounds once. Knows nothing about devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from midspan.errors import GraphError
from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number, text

Unary = Callable[[torch.Tensor], torch.Tensor]
Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_HALF_ROOT = 0.5**0.5


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0) squared."""
    return torch.relu(x).square()


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU, also for numbers near the largest, where torch's own overflows on some processors."""
    return x * (0.5 * (1.0 + torch.erf(x * _HALF_ROOT)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Unary] = {
    "silu": F.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.relu,
    "relu_squared": relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""What the attribute ``function`` of ``activation``, ``gated`` and ``gated_pair`` may say."""


def activation_function(site: KernelSite) -> Unary:
    """The function that a site's attribute names.

    Raises:
        GraphError: there is none of that name.
    """
    name = text(site, "function")
    if name not in FUNCTIONS:
        raise GraphError(f"function '{name}' is not one of {', '.join(FUNCTIONS)}", node=site.node.name)
    return FUNCTIONS[name]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels for ``add``, ``multiply``, ``scale``, ``scale_rows``, ``activation``, ``gated`` and ``gated_pair``."""
    return (
        Kernel(name="portable", op="add", prepare=lambda site: torch.add),
        Kernel(name="portable", op="multiply", prepare=lambda site: torch.mul),
        Kernel(name="portable", op="scale", prepare=_scale),
        Kernel(name="portable", op="scale_rows", prepare=_scale_rows),
        Kernel(name="portable", op="activation", prepare=_activation),
        Kernel(name="portable", op="gated", prepare=_gated),
        Kernel(name="portable", op="gated_pair", prepare=_gated_pair),
    )


def _scale(site: KernelSite) -> Unary:
    factor = number(site, "factor")

    def scale(x: torch.Tensor) -> torch.Tensor:
        return (x.float() * factor).to(x.dtype)

    return scale


def _scale_rows(site: KernelSite) -> Binary:
    function = None if site.node.attributes["function"] is None else activation_function(site)

    def scale_rows(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        wide = factor.float()
        return (x.float() * (wide if function is None else function(wide))).to(x.dtype)

    return scale_rows


def _activation(site: KernelSite) -> Unary:
    function = activation_function(site)

    def activation(x: torch.Tensor) -> torch.Tensor:
        return function(x.float()).to(x.dtype)

    return activation


def _gated(site: KernelSite) -> Binary:
    function = activation_function(site)

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (function(gate.float()) * up).to(gate.dtype)

    return gated


def _gated_pair(site: KernelSite) -> Unary:
    function = activation_function(site)

    def gated_pair(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return (function(gate.float()) * up).to(x.dtype)

    return gated_pair
