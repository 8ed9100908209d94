"""Each check of operations fails for the fault that it is meant for; the list of cases leaves nothing out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from midspan.conformance.case_fitting import fit, fitting
from midspan.conformance.levels.operations import placement_of
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_check import disagreement
from midspan.conformance.operation_run import Setting
from midspan.conformance.packed_cases import packed_cases
from midspan.conformance.subject import Subject
from midspan.conformance.suite import level_checks, run_check
from midspan.interface import OPERATIONS, Capabilities
from midspan.weights.quantization import FORMATS, dequantize

Failures = Callable[..., set[str]]
Open = Callable[..., Subject]

ATTENTION = "attention-float32-cache-float32-blocks-16"


def test_a_device_that_is_right_fails_nothing(open_flawed: Open, failures: Failures) -> None:
    assert failures(open_flawed(), "operations") == set()


@pytest.mark.parametrize(
    ("fault", "among", "caught_by"),
    [
        ("add is a little off", ("add-", "multiply-"), {"add-float32"}),
        ("multiply computes in bfloat16", ("add-", "multiply-"), {"multiply-float32"}),
        ("layer_norm needs rows", ("_norm-",), {"layer_norm-float32"}),
        ("activation hides what is no number", ("activation-",), {"activation-float32"}),
        ("activation is refused", ("activation-", "gated-"), {"activation-float32"}),
        ("scale forgets the sign of the columns", ("scale-",), {"scale-float32"}),
        ("split has a shape of its own", ("split-",), {"split-float32"}),
        ("linear's second kernel lies", ("linear-",), {"kernels-of-linear-float32"}),
        ("gated refuses without a word", ("gated-",), {"kernels-of-gated-float32"}),
        ("attention sees what was never written", ("attention-",), {ATTENTION}),
        ("strict means nothing", ("split-", "scale-"), {"kernels-of-split-float32", "kernels-of-scale-float32"}),
        ("fallbacks are not marked", ("split-", "scale-"), {"kernels-of-split-float32", "kernels-of-scale-float32"}),
        ("takes memory as it lies", ("add-",), {"add-float32"}),
        ("writes to its inputs", ("scale-",), {"scale-float32"}),
        ("rms_norm doubles its inputs", ("rms_norm",), {"inputs-kept-by-rms_norm"}),
        ("linear doubles its inputs", ("linear",), {"inputs-kept-by-linear"}),
        ("rotary doubles its inputs", ("rotary",), {"inputs-kept-by-rotary"}),
        ("sample doubles its inputs", ("inputs-kept",), {"inputs-kept-by-sample"}),
        ("places no nodes", ("placement",), {"placement-names-every-node"}),
        ("places nodes backwards", ("placement",), {"placement-names-every-node"}),
        ("claims a format that it does not take", ("packed-", "quant"), {"packed-gguf.q8_0-float32"}),
        ("claims a format that nobody knows", ("packed-", "quant"), {"quantizations-are-known"}),
    ],
)
def test_a_fault_is_caught_by_the_check_for_it(
    fault: str, among: tuple[str, ...], caught_by: set[str], open_flawed: Open, failures: Failures
) -> None:
    subject = open_flawed(fault)
    assert failures(subject, "operations", among) == caught_by


def test_problems_of_kernels_are_not_counted_as_cases(open_flawed: Open) -> None:
    subject = open_flawed("strict means nothing")
    check = next(check for check in level_checks(subject, "operations") if check.name == "kernels-of-scale-float32")
    message = run_check(subject, check).message.splitlines()[0]
    assert re.fullmatch(r"\d+ problems of kernels in \d+ cases:", message)


def test_every_operation_has_cases_strided_extreme_and_without_rows() -> None:
    cases = operation_cases(16)
    assert len({case.name for case in cases}) == len(cases)
    for op in OPERATIONS:
        mine = [case for case in cases if case.op == op]
        assert any("strided" in case.name for case in mine)
        assert any(len(np.asarray(case.inputs[-1 if op == "select_rows" else 0])) == 0 for case in mine)
    assert any(not case.inputs[0].flags.c_contiguous for case in cases if isinstance(case.inputs[0], np.ndarray))
    with_special = {
        case.op
        for case in cases
        if any(
            isinstance(value, np.ndarray) and value.dtype == np.float32 and not np.isfinite(value).all()
            for value in (*case.inputs, *case.weights.values())
        )
    }
    assert with_special >= {"add", "multiply", "activation", "linear", "logits", "rms_norm", "embedding", "sample"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_definition_agrees_with_itself_on_every_case(dtype: str) -> None:
    for case in operation_cases(8):
        outputs, cache = case.expected(dtype, dtype)
        wide = [output if output.dtype.kind in "ib" else output.astype(np.float32) for output in outputs]
        assert disagreement(case, dtype, dtype, wide, cache) is None, case.name


@pytest.mark.parametrize("name", FORMATS)
def test_packed_cases_mean_what_their_bytes_say(name: str) -> None:
    for case in packed_cases(name):
        np.testing.assert_array_equal(case.weights["weight"], dequantize(case.packed["weight"]))
        assert np.abs(case.weights["weight"]).max() < 256


@pytest.mark.parametrize(
    "claims",
    [
        Capabilities(max_tokens=1),
        Capabilities(max_requests=2, max_context=33),
        Capabilities(max_sampled_rows=1, max_logprobs=1),
    ],
    ids=["one token", "short and few", "one sampled row"],
)
def test_cases_are_cut_to_the_claimed_limits_and_some_of_each_operation_remain(claims: Capabilities) -> None:
    cases = fitting(operation_cases(16), claims)
    assert {case.op for case in cases} == set(OPERATIONS)
    for case in cases:
        assert case.context() <= (claims.max_context or 1 << 30)
        if case.op == "attention":
            assert len(np.asarray(case.inputs[4])) <= (claims.max_requests or 64)
        if claims.max_tokens is not None:
            assert len(np.asarray(case.inputs[0])) <= claims.max_tokens
        outputs, cache = case.expected("float32", "float32")
        assert disagreement(case, "float32", "float32", list(outputs), cache) is None


def test_a_case_that_cannot_be_cut_says_which_limit_is_in_the_way() -> None:
    case = next(case for case in operation_cases(16) if case.name == "attention, a ragged batch")
    assert "max_requests is 2" in str(fit(case, Capabilities(max_requests=2)))


def test_the_check_wants_what_is_no_number_to_be_met_exactly() -> None:
    case = next(case for case in operation_cases(16) if case.name == "add, extreme numbers")
    (right,), _ = case.expected("float32", "float32")
    for place in (np.isnan(right), np.isposinf(right)):
        wrong = np.where(place, np.float32(3e38), right)
        assert disagreement(case, "float32", "float32", [wrong]) is not None
    hidden = replace(case, inputs=tuple(np.nan_to_num(np.asarray(value)) for value in case.inputs))
    assert disagreement(hidden, "float32", "float32", [right]) is not None


def test_a_placement_names_the_kernels_that_were_not_asked(open_flawed: Open) -> None:
    subject = open_flawed("linear's second kernel lies")
    case = next(case for case in operation_cases(16) if case.op == "linear" and "bias" not in case.weights)
    setting = Setting(dtype="float32", cache_dtype="float32", block_size=16)
    default = placement_of(subject.device(), case, setting)
    forced = placement_of(subject.device(), case, replace(setting, kernels={"linear": "own"}))
    assert default is not None
    assert forced is not None
    assert (default.kernel, default.others) == ("numpy", ("own",))
    assert (forced.kernel, forced.others) == ("own", ("numpy",))
