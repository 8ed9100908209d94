"""Holds what a kernel returned against the definition.

Numpy only; the caller brings the kernel's outputs to the host as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_margins import FLOAT32_UNIT, margins


def disagreement(
    case: OperationCase,
    dtype: str,
    cache_dtype: str,
    outputs: Sequence[NDArray[Any]],
    cache: NDArray[np.float32] | None = None,
) -> str | None:
    """What is wrong with a kernel's outputs, or None.

    Args:
        case: what was run.
        dtype: the activation type.
        cache_dtype: the type of the KV cache.
        outputs: the kernel's outputs; activations as float32.
        cache: all blocks after the step in the canonical layout, for attention.

    Returns:
        For a person: which output, how many elements, and the worst of them.
    """
    expected, expected_cache = case.expected(dtype, cache_dtype)
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs instead of {len(expected)}"
    allowed = _sample_margins(expected) if case.op == "sample" else margins(case, dtype, cache_dtype)
    for place, (found, wanted, margin) in enumerate(zip(outputs, expected, allowed, strict=True)):
        problem = _beyond(found, wanted, margin)
        if problem:
            return f"output {place}: {problem}"
    if expected_cache is None or cache is None:
        return None
    # Block 0 is the padding block, which a device may fill with anything.
    if np.array_equal(cache[:, :, 1:], expected_cache[:, :, 1:], equal_nan=True):
        return None
    return "the cache holds something else than the tokens' keys and values, or lost what it held"


def _beyond(found: NDArray[Any], wanted: NDArray[Any], margin: NDArray[Any]) -> str | None:
    if found.shape != wanted.shape:
        return f"shape {found.shape} instead of {wanted.shape}"
    got, want = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = (np.abs(got - want) <= margin) & np.isfinite(want)
        far = ~(near | (got == want) | (np.isnan(got) & np.isnan(want)))
    if not far.any():
        return None
    index = tuple(int(place) for place in np.argwhere(far)[0])
    return (
        f"{int(far.sum())} of {far.size} elements are off; at {index} it is {got[index]:.9g} instead of "
        f"{want[index]:.9g}, which is more than {np.broadcast_to(margin, want.shape)[index]:.3g} away"
    )


def _sample_margins(expected: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Ids, ranks and flags are exact; a logprob is one float32 rounding of sums that may be added in another order."""
    exact = [np.zeros(output.shape) for output in expected]
    for place in (1, 4):
        exact[place] = 16.0 * FLOAT32_UNIT * (1.0 + np.abs(expected[place].astype(np.float64)))
    return exact
