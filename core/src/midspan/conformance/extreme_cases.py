"""Cases with numbers at the ends of their types, and with what is no number.

Numpy only; see ``operation_case``. All finite numbers here are powers of two, or sums of
few, that float32, bfloat16 and float16 hold exactly, except where a comment says how they are
rounded alike. What is infinite or no number is used where IEEE 754 arithmetic, in any order,
leaves one answer; in operations whose rows are independent it must stay in its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.random_values import grid
from midspan.interface.graph import Attribute

Float32 = NDArray[np.float32]

FINITE = (0.0, -0.0, 1.0, -1.0, 2.0**-14, -(2.0**-14), 2.0**-24, 2.0**-12, 2.0**12, -(2.0**12), 2.0**15, -(2.0**15))
"""Zeros, one, float16's smallest normal and smallest number, and large ones."""

SPECIAL = (np.inf, -np.inf, np.nan)

TINY = 2.0**-130
"""Below the normal numbers of float32 and bfloat16; float16 rounds it to zero. Arithmetic may take it for zero."""

DEFINED_AT_MINUS_INFINITY = ("relu", "relu_squared", "sigmoid", "tanh")
"""The other functions are zero times infinity there."""


def extreme_cases(functions: tuple[str, ...]) -> Iterator[OperationCase]:
    """All of them but attention's.

    Args:
        functions: of ``activation`` and its kin.
    """
    yield from _elementwise(functions)
    yield from _moved()
    yield from _norms()
    yield from _products()
    yield from _rotary()


def _pairs(values: tuple[float, ...]) -> tuple[Float32, Float32]:
    """Every number with every number."""
    first, second = np.meshgrid(np.array(values, np.float32), np.array(values, np.float32))
    return np.ascontiguousarray(first), np.ascontiguousarray(second)


def _elementwise(functions: tuple[str, ...]) -> Iterator[OperationCase]:
    yield OperationCase(name="add, extreme numbers", op="add", inputs=_pairs((*FINITE, TINY, *SPECIAL)))
    a, b = _pairs((*FINITE, *SPECIAL))
    yield OperationCase(name="multiply, extreme numbers", op="multiply", inputs=(a, b))
    yield OperationCase(name="scale, extreme numbers", op="scale", inputs=(a,), attributes={"factor": 0.7})
    finite, factor = _pairs(FINITE)
    for function in functions:
        values = (*FINITE, np.inf, np.nan, *([-np.inf] * (function in DEFINED_AT_MINUS_INFINITY)))
        x = np.array([values, values[::-1]], np.float32)
        attributes: Mapping[str, Attribute] = {"function": function}
        yield OperationCase(
            name=f"activation {function}, extreme numbers", op="activation", inputs=(x,), attributes=attributes
        )
        yield OperationCase(
            name=f"gated {function}, extreme numbers", op="gated", inputs=(finite, factor), attributes=attributes
        )
        pair = np.concatenate((finite, factor), axis=-1)
        yield OperationCase(
            name=f"gated_pair {function}, extreme numbers", op="gated_pair", inputs=(pair,), attributes=attributes
        )


def _moved() -> Iterator[OperationCase]:
    """Numbers that are only carried somewhere."""
    values = np.array((*FINITE, TINY, *SPECIAL), np.float32)
    table = np.stack([np.roll(values, shift) for shift in range(5)])
    ids = np.array([4, 0, 0, 2], np.int32)
    yield OperationCase(name="embedding, extreme numbers", op="embedding", inputs=(ids,), weights={"weight": table})
    yield OperationCase(
        name="select_rows, extreme numbers", op="select_rows", inputs=(table, np.array([1, 4], np.int32))
    )
    yield OperationCase(name="split, extreme numbers", op="split", inputs=(table,), attributes={"sizes": (9, 7)})


def _norms() -> Iterator[OperationCase]:
    random = np.random.default_rng(21)
    size = 64
    plain = grid(random, (size,))
    weight = {"weight": grid(random, (size,))}
    one_large = plain.copy()
    one_large[7] = 2.0**12
    rows = {
        "zeros": np.zeros(size),
        "large": np.sign(plain + 0.01) * 2.0**14,
        "small": plain * 2.0**-9,
        "one large": one_large,
        "all the same": np.full(size, 3.0),
        "no number": np.where(np.arange(size) == 5, np.nan, plain),
        "plain": plain,
    }
    x = np.stack(list(rows.values())).astype(np.float32)
    attributes: Mapping[str, Attribute] = {"epsilon": 1e-5}
    name = "rows of extreme numbers"
    yield OperationCase(name=f"rms_norm, {name}", op="rms_norm", inputs=(x,), weights=weight, attributes=attributes)
    yield OperationCase(name=f"layer_norm, {name}", op="layer_norm", inputs=(x,), weights=weight, attributes=attributes)
    yield OperationCase(
        name=f"add_rms_norm, {name}",
        op="add_rms_norm",
        inputs=(x / np.float32(2), x / np.float32(2)),
        weights=weight,
        attributes=attributes,
    )


def _products() -> Iterator[OperationCase]:
    random = np.random.default_rng(22)
    columns = 96
    x = grid(random, (6, columns))
    x[0] *= np.float32(2.0**6)
    x[1] *= np.float32(2.0**-9)
    x[2, ::2] *= np.float32(2.0**6)
    x[3] = 0.0
    x[4, 17] = np.nan
    weights = {"weight": grid(random, (33, columns), 1.0)}
    named = "rows of extreme numbers"
    yield OperationCase(name=f"linear, {named}", op="linear", inputs=(x,), weights=weights)
    yield OperationCase(name=f"logits, {named}", op="logits", inputs=(x,), weights=weights)
    yield OperationCase(
        name=f"logits, {named}, capped", op="logits", inputs=(x,), weights=weights, attributes={"soft_cap": 2.0}
    )


def _rotary() -> Iterator[OperationCase]:
    random = np.random.default_rng(23)
    size = 32
    frequencies = tuple(float(500000.0 ** (-2.0 * pair / size)) for pair in range(size // 2))
    positions = np.array([0, 1, 4095, 65536, 99999, 131071], np.int32)
    query, key = grid(random, (6, 2 * size)), grid(random, (6, size))
    query[0] *= np.float32(2.0**12)
    key[1] *= np.float32(2.0**-9)
    yield OperationCase(
        name="rotary, far positions and extreme numbers",
        op="rotary",
        inputs=(query, key, positions),
        attributes={"head_size": size, "rotary_size": size, "inverse_frequencies": frequencies},
    )
