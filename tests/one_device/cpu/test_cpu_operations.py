"""Every kernel that the cpu device can take, on every case of every operation, in every type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_check import disagreement
from midspan.interface import OPERATIONS
from midspan.runtimes.torch.program import TorchRuntime
from midspan_cpu.kernels.table import NATIVE_OPERATIONS, KernelSet

CASES = operation_cases(block_size=16)
TYPES = ["float32", "bfloat16", "float16"]

Run = Callable[..., tuple[list[Any], Any, str]]


def cases_of(op: str) -> list[Any]:
    return [case for case in CASES if case.op == op]


def test_there_is_a_case_for_every_operation() -> None:
    assert {case.op for case in CASES} == set(OPERATIONS)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_a_portable_kernel_computes_what_the_definition_says(op: str, dtype: str, run_case: Run) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu", widens_products=True)
    for case in cases_of(op):
        outputs, cache, kernel = run_case(case, runtime, dtype, dtype)
        assert kernel == "portable"
        assert disagreement(case, dtype, dtype, outputs, cache) is None, case.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_portable_products_that_are_not_widened_agree_too(dtype: str, run_case: Run) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu")
    for case in cases_of("linear"):
        outputs, _, _ = run_case(case, runtime, dtype, dtype)
        assert disagreement(case, dtype, dtype, outputs) is None, case.name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", NATIVE_OPERATIONS)
def test_a_native_kernel_computes_what_the_definition_says(
    op: str, dtype: str, run_case: Run, kernel_set: KernelSet
) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu", kernels=kernel_set.kernels, transposed_keys=True)
    taken = set()
    for case in cases_of(op):
        outputs, cache, kernel = run_case(case, runtime, dtype, dtype)
        taken.add(kernel)
        assert disagreement(case, dtype, dtype, outputs, cache) is None, case.name
    # Gates of rare functions are left to the portable kernels; everything else must be native.
    assert taken == ({"native", "portable"} if op in ("gated", "gated_pair", "experts") else {"native"})


@pytest.mark.parametrize("op", ["linear", "logits"])
def test_onednn_computes_what_the_definition_says(op: str, run_case: Run, kernel_set: KernelSet) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu", kernels=kernel_set.kernels)
    for case in cases_of(op):
        outputs, _, kernel = run_case(case, runtime, "float32", "float32", kernel="onednn")
        assert kernel == "onednn"
        assert disagreement(case, "float32", "float32", outputs) is None, case.name


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "int8"),
        ("bfloat16", "int8"),
        ("float32", "float8_e4m3"),
        ("float16", "float8_e4m3"),
    ],
)
@pytest.mark.parametrize("kernel", ["portable", "native"])
def test_attention_takes_a_cache_of_another_type(
    kernel: str, dtype: str, cache_dtype: str, run_case: Run, kernel_set: KernelSet
) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu", kernels=kernel_set.kernels, transposed_keys=True)
    for case in cases_of("attention"):
        outputs, cache, taken = run_case(case, runtime, dtype, cache_dtype, kernel=kernel)
        assert taken == kernel
        assert disagreement(case, dtype, cache_dtype, outputs, cache) is None, case.name


def test_the_check_finds_a_wrong_number_a_wrong_shape_and_a_lost_cache(run_case: Run) -> None:
    runtime = TorchRuntime(device="cpu", device_id="cpu")
    case = next(case for case in CASES if case.name == "attention, window")
    outputs, cache, _ = run_case(case, runtime, "float32", "float32")
    wrong = [outputs[0].copy()]
    wrong[0][3, 5] += 0.01
    assert "1 of" in str(disagreement(case, "float32", "float32", wrong, cache))
    assert "shape" in str(disagreement(case, "float32", "float32", [outputs[0][:-1]], cache))
    assert "cache" in str(disagreement(case, "float32", "float32", outputs, np.zeros_like(cache)))
