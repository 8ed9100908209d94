"""The definitions of the mixture of experts against plain float64 arithmetic, and their independence of other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from midspan.runtimes.reference.operations import REFERENCE

ROUTE: dict[str, Any] = {
    "top_k": 2,
    "scoring": "softmax",
    "normalize": False,
    "groups": 1,
    "top_groups": 1,
    "group_scoring": "largest",
    "scale": 1.0,
}
EXPERTS: dict[str, Any] = {"function": "silu", "limit": None, "slope": 1.0, "up_offset": 0.0}


def route(logits: Any, bias: Any = None, **attributes: Any) -> tuple[list[list[int]], NDArray[np.float32]]:
    weights = {} if bias is None else {"bias": np.array(bias, np.float32)}
    ids, shares = REFERENCE["route"](np.array(logits, np.float32), **weights, **{**ROUTE, **attributes})
    assert ids.dtype == np.int32
    assert shares.dtype == np.float32
    return ids.tolist(), shares


def test_the_best_experts_come_first_with_their_share_of_all() -> None:
    logits = [[0.0, 2.0, 1.0, -1.0]]
    powers = np.exp(logits[0])
    ids, shares = route(logits)
    assert ids == [[1, 2]]
    np.testing.assert_allclose(shares[0], powers[[1, 2]] / powers.sum(), rtol=1e-6)
    ids, shares = route(logits, normalize=True, scale=2.5)
    np.testing.assert_allclose(shares[0], 2.5 * powers[[1, 2]] / powers[[1, 2]].sum(), rtol=1e-6)


def test_among_equals_the_lower_number_is_better() -> None:
    assert route([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]], top_k=3)[0] == [[1, 2, 3], [0, 1, 2]]


def test_a_correction_changes_who_is_chosen_and_not_the_shares() -> None:
    logits = np.array([[0.0, 2.0, 1.0, -1.0]])
    ids, shares = route(logits, [1.0, 0.0, 0.0, 1.0], scoring="sigmoid")
    assert ids == [[0, 3]]
    np.testing.assert_allclose(shares[0], 1 / (1 + np.exp(-logits[0, [0, 3]])), rtol=1e-6)


def test_only_the_best_groups_are_chosen_from() -> None:
    logits = [[9.0, 0.0, 5.0, 5.5, 1.0, 2.0]]
    assert route(logits, groups=3, top_groups=1)[0] == [[0, 1]]
    # By the sum of two, the second group's scores beat the single large one.
    bias = [0.0] * 6
    assert route(logits, bias, groups=3, top_groups=1, group_scoring="two_largest", scoring="sigmoid")[0] == [[3, 2]]
    assert route(logits, groups=3, top_groups=2, top_k=3)[0] == [[0, 3, 2]]


@pytest.mark.parametrize("biased", [False, True])
def test_experts_add_up_what_the_chosen_make(biased: bool) -> None:
    random = np.random.default_rng(0)
    x, gate_up, down = (random.standard_normal(shape) for shape in ((4, 6), (3, 10, 6), (3, 6, 5)))
    gate_up_bias, down_bias = random.standard_normal((3, 10)) * biased, random.standard_normal((3, 6)) * biased
    ids = np.array([[0, 2], [1, 0], [2, 1], [1, 2]], np.int32)
    shares = random.random((4, 2))
    attributes = {**EXPERTS, "limit": 1.0, "slope": 1.5, "up_offset": 1.0} if biased else EXPERTS
    expected = np.zeros_like(x)
    for row in range(4):
        for expert, share in zip(ids[row], shares[row], strict=True):
            gate, up = np.split(gate_up[expert] @ x[row] + gate_up_bias[expert], 2)
            if biased:
                gate, up = np.minimum(gate, 1.0), np.clip(up, -1.0, 1.0) + 1.0
            middle = gate / (1 + np.exp(-gate * attributes["slope"])) * up
            expected[row] += share * (down[expert] @ middle + down_bias[expert])
    weights = {"gate_up": gate_up, "down": down}
    if biased:
        weights.update(gate_up_bias=gate_up_bias, down_bias=down_bias)
    narrow = {role: array.astype(np.float32) for role, array in weights.items()}
    given = (x.astype(np.float32), ids, shares.astype(np.float32))
    found = REFERENCE["experts"](*given, **narrow, **attributes)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for row in range(4):
        alone = REFERENCE["experts"](*(value[row : row + 1] for value in given), **narrow, **attributes)
        assert np.array_equal(alone[0], found[row])


def test_rows_are_scaled_by_what_a_function_makes_of_their_factor() -> None:
    x, factor = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32), np.array([[2.0], [0.0]], np.float32)
    assert REFERENCE["scale_rows"](x, factor, function=None).tolist() == [[2.0, -4.0], [0.0, 0.0]]
    np.testing.assert_allclose(REFERENCE["scale_rows"](x, factor, function="sigmoid")[1], [1.5, 2.0])
