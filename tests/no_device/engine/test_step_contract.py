"""A step that returns something else than the interface says fails with the plugin's name, and nothing else fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from midspan import SamplingParams
from midspan.devices.discovery import DeviceCatalogue
from midspan.errors import PluginError
from midspan.interface import Batch, Cache, FinishedStep, Program, StepOutput, StepResult

Change = Callable[[StepResult], Any]

BREACHES: dict[str, tuple[Change, str]] = {
    "floats": (lambda good: replace(good, token_ids=good.token_ids.astype(np.float32)), "token_ids is float32"),
    "wide integers": (lambda good: replace(good, token_ids=good.token_ids.astype(np.int64)), "token_ids is int64"),
    "two axes": (lambda good: replace(good, token_ids=good.token_ids[:, None]), r"token_ids is int32 \[1, 1\]"),
    "too few": (lambda good: replace(good, token_ids=good.token_ids[:0]), r"it must be int32 \[1\]"),
    "a list": (lambda good: replace(good, token_ids=good.token_ids.tolist()), "must be a numpy array"),
    "negative": (lambda good: replace(good, token_ids=np.full_like(good.token_ids, -1)), "holds -1"),
    "beyond": (lambda good: replace(good, token_ids=np.full_like(good.token_ids, 10**6)), "ids are from 0 to"),
    "no result": (lambda good: None, "must be a StepResult"),
    "flags of another type": (lambda good: replace(good, invalid=np.zeros(1, np.int8)), "invalid is int8"),
    "negative time": (lambda good: replace(good, device_seconds=-1.0), "device_seconds is -1"),
    "no logprobs": (lambda good: replace(good, logprobs=None), "the batch asked for 2"),
    "narrow logprobs": (
        lambda good: good.logprobs and replace(good, logprobs=replace(good.logprobs, top=good.logprobs.top[:, :1])),
        r"logprobs.top is float32 \[1, 1\]",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_wrong_result_fails_its_request_and_the_engine_goes_on(
    name: str, make_llm: Callable[..., Any], wrapping: Callable[..., DeviceCatalogue]
) -> None:
    change, message = BREACHES[name]
    broken = False

    def run(batch: Batch, cache: Cache, program: Program) -> StepOutput:
        good = program.run(batch, cache).result()
        return FinishedStep(step_result=change(good) if broken else good)

    llm = make_llm(catalogue=wrapping(run))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    expected = llm.generate([prompt], params)[0].outputs[0].token_ids
    broken = True
    failed = llm.generate([prompt], params)[0].outputs[0]
    assert failed.finish_reason == "error"
    assert re.search(message, str(failed.error))
    assert "wrapped" in str(failed.error)
    broken = False
    assert llm.generate([prompt], params)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(("returned", "message"), [(None, "Program.run returned None"), (3, "Program.run returned 3")])
def test_a_program_that_returns_no_output_is_refused_before_anybody_waits(
    returned: Any, message: str, make_llm: Callable[..., Any], wrapping: Callable[..., DeviceCatalogue]
) -> None:
    with pytest.raises(PluginError, match=message):
        make_llm(catalogue=wrapping(lambda batch, cache, program: returned))
