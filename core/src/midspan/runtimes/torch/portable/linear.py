"""Portable kernels of the matrix products: ``linear`` and ``logits``.

Weights are kept in the activation type, and packed ones are unpacked to it. On a
device that multiplies 16-bit types badly, they are widened to float32 a tile at a time:
the product then runs at the speed of float32 and the weight still takes 16 bits in
memory. Weights whose products round their inputs too (``int8.dynamic``) keep 8 bits, see
``dynamic_int8``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.portable.dynamic_int8 import dynamic_product
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number, optional_number
from midspan.weights.array_formats import DYNAMIC

Unary = Callable[[torch.Tensor], torch.Tensor]

_TILE_ELEMENTS = 1 << 20
"""Widened weight elements at a time: 4 MiB, so that a tile stays in a host's cache."""

_FEW_ROWS = 4
"""Up to here the product is bound by reading the weight, and widening it costs more than it gains:
[M, 2048] x [8192, 2048] took 1.9 ms in bfloat16 and 5 ms widened for M = 1, 26 ms and 20 ms for M = 16
(two cores with AVX2 and no bfloat16 instructions)."""


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels for ``linear`` and ``logits``."""

    def prepare_linear(site: KernelSite) -> Unary:
        return _linear(site, preparation)

    def prepare_logits(site: KernelSite) -> Unary:
        return _logits(site, preparation)

    return (
        Kernel(name="portable", op="linear", prepare=prepare_linear),
        Kernel(name="portable", op="logits", prepare=prepare_logits),
    )


def _bias(site: KernelSite, preparation: Preparation) -> torch.Tensor | None:
    stored = site.weights.get("bias")
    return None if stored is None else preparation.vector(stored, torch_type(site.dtype))


def _wide_product(site: KernelSite, preparation: Preparation) -> Unary:
    """The product with the site's weight and bias, in float32."""
    bias = _bias(site, preparation)
    if site.weights["weight"].format == DYNAMIC:
        return dynamic_product(site.weights["weight"], bias, preparation)
    weight = preparation.tensor(site.weights["weight"], torch_type(site.dtype))
    return lambda x: widened_product(x, weight, bias)


def _linear(site: KernelSite, preparation: Preparation) -> Unary:
    dtype = torch_type(site.dtype)
    product, bias = _wide_product(site, preparation), _bias(site, preparation)
    if site.weights["weight"].format == DYNAMIC:
        return lambda x: product(x).to(dtype)
    weight = preparation.tensor(site.weights["weight"], dtype)
    if dtype == torch.float32:
        return lambda x: F.linear(x, weight, bias)

    def linear(x: torch.Tensor) -> torch.Tensor:
        if bias is None and (x.shape[0] <= _FEW_ROWS or not preparation.widens_products):
            return F.linear(x, weight)
        return product(x).to(dtype)

    return linear


def _logits(site: KernelSite, preparation: Preparation) -> Unary:
    product = _wide_product(site, preparation)
    factor, cap = number(site, "scale"), optional_number(site, "soft_cap")

    def logits(x: torch.Tensor) -> torch.Tensor:
        result = product(x)
        if factor != 1.0:
            result *= factor
        if cap is not None:
            result = cap * torch.tanh(result / cap)
        return result

    return logits


def widened_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in float32, without a float32 copy of the whole weight.

    Args:
        x: [N, in], any floating type.
        weight: [out, in], any floating type.
        bias: float32 [out], or None.

    Returns:
        float32 [N, out].
    """
    if weight.dtype == torch.float32:
        return F.linear(x.float(), weight, bias)
    wide = x.float()
    result = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    rows = max(1, _TILE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        tile = weight[start : start + rows].float()
        torch.mm(wide, tile.t(), out=result[:, start : start + rows])
    return result if bias is None else result.add_(bias)
