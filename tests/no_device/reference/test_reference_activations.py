"""Activation functions at the ends of the number range."""

from __future__ import annotations

import numpy as np
import pytest

from midspan.runtimes.reference.operations import REFERENCE


@pytest.mark.parametrize(("function", "low", "high"), [("silu", -0.0, 1000.0), ("sigmoid", 0.0, 1.0)])
def test_large_inputs_saturate_without_a_warning(function: str, low: float, high: float) -> None:
    x = np.array([[-1000.0, 1000.0]], dtype=np.float32)
    np.testing.assert_array_equal(REFERENCE["activation"](x, function=function), [[low, high]])
