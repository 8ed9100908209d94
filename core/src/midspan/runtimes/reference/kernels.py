"""The definitions of all operations as a table of kernels.

Weights are rounded to the activation type, as a checkpoint of that type would
have them, and kept in float32 where they are multiplied; packed ones are unpacked
when a node is prepared. Knows nothing about graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from midspan.interface.kernel import Kernel, KernelSite, No, Support, Yes
from midspan.runtimes.reference.activations import ACTIVATIONS
from midspan.runtimes.reference.operations import REFERENCE
from midspan.runtimes.reference.packed_weights import READABLE, DynamicInt8, WeightOperand, weight_operand

KERNEL_NAME = "numpy"


def _supports(site: KernelSite) -> Support:
    for role, tensor in site.weights.items():
        if tensor.format not in READABLE:
            return No(f"takes {', '.join(READABLE)}, and '{role}' is packed as {tensor.format}")
    function = site.node.attributes.get("function")
    if function is not None and function not in ACTIVATIONS:
        return No(f"has no function {function!r}, only {', '.join(ACTIVATIONS)}")
    return Yes()


def _weight(site: KernelSite, role: str) -> WeightOperand:
    if site.node.op == "route":  # ranks are decided by differences that 16 bits would not keep
        return site.weights[role].parts["data"].astype(np.float32, copy=False)
    operand = weight_operand(site.weights[role], site.dtype, site.node.op)
    if isinstance(operand, DynamicInt8) or site.node.op == "embedding":
        return operand
    return operand.astype(np.float32, copy=False)


def _prepare(site: KernelSite) -> Callable[..., Any]:
    function = REFERENCE[site.node.op]
    keywords: dict[str, Any] = {**site.node.attributes}
    keywords.update({role: _weight(site, role) for role in site.weights})

    def run(*inputs: Any) -> Any:
        result = function(*inputs, **keywords)
        return result[0] if isinstance(result, tuple) and len(result) == 1 else result

    return run


KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(name=KERNEL_NAME, op=op, prepare=_prepare, supports=_supports) for op in REFERENCE
)
"""One kernel for each operation."""
