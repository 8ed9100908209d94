"""Portable kernels of ``rms_norm``, ``layer_norm`` and ``add_rms_norm``.

A weight shorter than the columns is applied to each run of its length, which is
how heads are normalised one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number

Unary = Callable[[torch.Tensor], torch.Tensor]
AddNorm = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels for the three normalizations."""

    def prepare_rms_norm(site: KernelSite) -> Unary:
        return _rms_norm(site, preparation)

    def prepare_add_rms_norm(site: KernelSite) -> AddNorm:
        return _add_rms_norm(site, preparation)

    def prepare_layer_norm(site: KernelSite) -> Unary:
        return _layer_norm(site, preparation)

    return (
        Kernel(name="portable", op="rms_norm", prepare=prepare_rms_norm),
        Kernel(name="portable", op="add_rms_norm", prepare=prepare_add_rms_norm),
        Kernel(name="portable", op="layer_norm", prepare=prepare_layer_norm),
    )


def scaled_weight(site: KernelSite, preparation: Preparation) -> torch.Tensor:
    """``weight + offset`` in float32."""
    weight = preparation.vector(site.weights["weight"], torch_type(site.dtype))
    offset = number(site, "offset")
    return weight if offset == 0.0 else weight + offset


def runs_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """[N, columns] as [N, columns / size, size], without a copy."""
    return x.view(*x.shape[:-1], x.shape[-1] // size, size)


def _rms_norm(site: KernelSite, preparation: Preparation) -> Unary:
    weight = scaled_weight(site, preparation)
    size, epsilon = weight.shape[-1:], number(site, "epsilon")

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        runs = runs_of(x, size[0]).float()
        return F.rms_norm(runs, size, weight, epsilon).flatten(-2).to(x.dtype)

    return rms_norm


def _add_rms_norm(site: KernelSite, preparation: Preparation) -> AddNorm:
    normalize = _rms_norm(site, preparation)

    def add_rms_norm(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.add(x, residual)
        return normalize(total), total

    return add_rms_norm


def _layer_norm(site: KernelSite, preparation: Preparation) -> Unary:
    weight = preparation.vector(site.weights["weight"], torch_type(site.dtype))
    stored = site.weights.get("bias")
    bias = None if stored is None else preparation.vector(stored, torch_type(site.dtype))
    size, epsilon = weight.shape[-1:], number(site, "epsilon")

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        runs = runs_of(x, size[0]).float()
        return F.layer_norm(runs, size, weight, bias, epsilon).flatten(-2).to(x.dtype)

    return layer_norm
