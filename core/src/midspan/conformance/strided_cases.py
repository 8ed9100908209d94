"""Cases whose host arrays do not lie in one piece: columns apart, rows backwards, Fortran order.

Numpy only; the numbers are those of other cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import CaseInput, OperationCase

LEAST_ROWS = 3


def strided_cases(cases: Sequence[OperationCase]) -> Iterator[OperationCase]:
    """One for each operation: its first case of several rows.

    Args:
        cases: with at least one such case for each operation.
    """
    seen: set[str] = set()
    for case in cases:
        first = case.inputs[0]
        if case.op not in seen and isinstance(first, np.ndarray) and len(first) >= LEAST_ROWS:
            seen.add(case.op)
            yield replace(case, name=f"{case.name}, strided", inputs=tuple(map(_strided, case.inputs)))


def _strided(value: CaseInput) -> CaseInput:
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 1:
        backwards: CaseInput = value[::-1].copy()[::-1]
        return backwards
    if value.dtype == np.int32:
        return np.asfortranarray(value)
    return _columns_apart(value)


def _columns_apart(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every other column of a wider array, whose columns between are no numbers."""
    wide = np.full((value.shape[0], 2 * value.shape[1] + 1), np.nan, np.float32)
    wide[:, 1::2] = value
    return wide[:, 1::2]
