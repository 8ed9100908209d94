"""Matrix products by oneDNN, through torch, with the weight packed once.

oneDNN chooses its blocking by the shape of the product, so the bits of a row
depend on how many rows there are: these kernels are not batch invariant. Where
the processor has no instructions for a 16-bit type, oneDNN refuses it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import number, optional_number

PRIORITY = 10

_PACKED_FOR_ROWS = 16
"""The number of rows that the packing is tuned for; any number can then be multiplied."""

Unary = Callable[[torch.Tensor], torch.Tensor]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels named ``onednn`` for ``linear`` and, in float32, ``logits``."""

    def prepare_linear(site: KernelSite) -> Unary:
        return _product(site, preparation)

    def prepare_logits(site: KernelSite) -> Unary:
        product, factor, cap = _product(site, preparation), number(site, "scale"), optional_number(site, "soft_cap")

        def logits(x: torch.Tensor) -> torch.Tensor:
            result = product(x)
            if factor != 1.0:
                result *= factor
            return result if cap is None else cap * torch.tanh(result / cap)

        return logits

    return (
        Kernel(name="onednn", op="linear", prepare=prepare_linear, supports=_supports, priority=PRIORITY),
        Kernel(name="onednn", op="logits", prepare=prepare_logits, supports=_supports_logits, priority=PRIORITY),
    )


def _supports(site: KernelSite) -> Support:
    if site.weights["weight"].format != DENSE:
        return No(f"takes dense weights only, not {site.weights['weight'].format}")
    if site.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return No("the processor has no instructions for bfloat16 that oneDNN uses")
    if site.dtype == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return No("the processor has no instructions for float16 that oneDNN uses")
    return Yes()


def _supports_logits(site: KernelSite) -> Support:
    if site.dtype != "float32":
        return No(f"would round the logits to {site.dtype}")
    return _supports(site)


def _product(site: KernelSite, preparation: Preparation) -> Unary:
    dtype = torch_type(site.dtype)
    weight = preparation.tensor(site.weights["weight"], dtype)
    stored = site.weights.get("bias")
    bias = None if stored is None else preparation.tensor(stored, dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    preparation.account(weight.nbytes)
    outputs = weight.shape[0]
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: torch.Tensor) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty((0, outputs))
        result: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return result

    return product
