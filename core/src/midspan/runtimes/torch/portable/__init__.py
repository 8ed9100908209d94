"""A torch version of every operation, for any device that torch computes on.

What each computes is defined by the numpy reference; these follow it within
rounding: arithmetic in float32, the result rounded once to the activation type.
They are the fallback of every device that uses the torch runtime, priority 0.
"""

from __future__ import annotations

from midspan.interface.kernel import Kernel
from midspan.runtimes.torch.portable import (
    attention,
    elementwise,
    linear,
    mixture,
    normalization,
    rotary,
    rows,
    sampling,
)
from midspan.runtimes.torch.preparation import Preparation


def portable_kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """One kernel named ``portable`` for each operation of the graph language.

    Args:
        preparation: of the program that they are made for.
    """
    return (
        *elementwise.kernels(preparation),
        *linear.kernels(preparation),
        *mixture.kernels(preparation),
        *normalization.kernels(preparation),
        *rotary.kernels(preparation),
        *rows.kernels(preparation),
        *attention.kernels(preparation),
        *sampling.kernels(preparation),
    )
