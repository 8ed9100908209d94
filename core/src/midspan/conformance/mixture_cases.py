"""Cases of the mixture of experts: ``route``, ``experts`` and ``scale_rows``.

Numpy only. Who is chosen is exact, so what experts are ranked by lies further apart than a kernel may be off,
but for equal logits, among which the lower number is better.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.random_values import grid
from midspan.interface.graph import Attribute

Float32 = NDArray[np.float32]


def mixture_cases() -> Iterator[OperationCase]:
    """All of them."""
    yield from _route_cases()
    yield from _experts_cases()
    yield from _scale_rows_cases()


def _apart(random: np.random.Generator, rows: int, columns: int) -> Float32:
    """Different numbers between -2 and 2, an eighth apart at least for up to 32 columns, in any order."""
    step = 4.0 / max(32, columns)
    ranks = np.stack([random.permutation(columns) for _ in range(rows)]) if rows else np.zeros((0, columns))
    return ((ranks - columns // 2) * step).astype(np.float32)


def _route_cases() -> Iterator[OperationCase]:
    random = np.random.default_rng(61)
    shapes: tuple[tuple[int, int, int, dict[str, Attribute]], ...] = (
        (1, 8, 2, {}),
        (0, 8, 2, {}),
        (7, 8, 2, {"normalize": True}),
        (5, 60, 4, {}),
        (3, 128, 8, {"normalize": True}),
        (4, 5, 5, {"scoring": "sigmoid"}),
        (6, 16, 1, {"scale": 2.5}),
        (6, 32, 4, {"scoring": "sigmoid", "normalize": True, "scale": 2.5}),
        (5, 32, 6, {"groups": 4, "top_groups": 2}),
        (5, 32, 3, {"groups": 8, "top_groups": 3, "scoring": "sigmoid", "group_scoring": "two_largest"}),
    )
    for rows, experts, top_k, attributes in shapes:
        said = "".join(f", {name} {value}" for name, value in attributes.items())
        logits = _apart(random, rows, experts)
        attributes = {"top_k": top_k, **attributes}
        yield OperationCase(
            name=f"route, {top_k} of {experts}, {rows} rows{said}", op="route", inputs=(logits,), attributes=attributes
        )
        if attributes.get("scoring") == "sigmoid":
            # Corrections of whole numbers decide first; within a whole number the scores are apart.
            bias = np.round(random.standard_normal(experts)).astype(np.float32)
            yield OperationCase(
                name=f"route, {top_k} of {experts}, {rows} rows{said}, corrected",
                op="route",
                inputs=(logits,),
                weights={"bias": bias},
                attributes=attributes,
            )
    equal = np.zeros((3, 24), np.float32)
    equal[1, [7, 20]], equal[2, :12] = 1.0, -1.0
    yield OperationCase(name="route, equal logits", op="route", inputs=(equal,), attributes={"top_k": 5})
    far = _apart(random, 3, 16) * np.float32(32.0)
    yield OperationCase(name="route, far logits", op="route", inputs=(far,), attributes={"top_k": 3})


def _experts_cases() -> Iterator[OperationCase]:
    random = np.random.default_rng(62)
    clamped: dict[str, Attribute] = {"limit": 1.5, "slope": 1.702, "up_offset": 1.0}
    shapes: tuple[tuple[str, int, int, int, int, int, dict[str, Attribute]], ...] = (
        # name, rows, experts, chosen, hidden, inner
        ("one row", 1, 8, 2, 64, 32, {}),
        ("no rows", 0, 4, 2, 32, 16, {}),
        ("odd sizes", 5, 3, 2, 33, 7, {}),
        ("many rows of few experts", 41, 3, 1, 48, 40, {"function": "gelu_tanh"}),
        ("few rows of many experts", 3, 17, 6, 40, 24, {}),
        ("gelu with biases", 6, 4, 2, 32, 24, {"function": "gelu", "bias": True}),
        ("clamped with biases", 9, 5, 3, 64, 48, {"bias": True, **clamped}),
        ("a rare function", 4, 4, 2, 32, 24, {"function": "relu_squared"}),
    )
    for name, rows, experts, chosen, hidden, inner, attributes in shapes:
        given = {"function": "silu", **attributes}
        biased = given.pop("bias", False)
        ids = np.stack([random.permutation(experts)[:chosen] for _ in range(rows)]) if rows else np.zeros((0, chosen))
        weights = {
            "gate_up": grid(random, (experts, 2 * inner, hidden), 0.25),
            "down": grid(random, (experts, hidden, inner), 0.25),
        }
        if biased:
            weights["gate_up_bias"] = grid(random, (experts, 2 * inner))
            weights["down_bias"] = grid(random, (experts, hidden))
        yield OperationCase(
            name=f"experts, {name}",
            op="experts",
            inputs=(grid(random, (rows, hidden)), ids.astype(np.int32), random.random((rows, chosen), np.float32)),
            weights=weights,
            attributes=given,
        )


def _scale_rows_cases() -> Iterator[OperationCase]:
    random = np.random.default_rng(63)
    for rows, columns in ((1, 64), (0, 8), (6, 35)):
        x, factor = grid(random, (rows, columns)), grid(random, (rows, 1))
        for function in (None, "sigmoid"):
            yield OperationCase(
                name=f"scale_rows {function or 'as it is'}, [{rows}, {columns}]",
                op="scale_rows",
                inputs=(x, factor),
                attributes={"function": function},
            )
