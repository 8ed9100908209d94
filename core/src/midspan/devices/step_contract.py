"""Holds what a step returned against the interface, before anybody uses it.

Knows shapes and types of results, and no request. It costs a few comparisons of
small arrays in each step, and keeps a program's mistake from reaching the
wire as a token.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from midspan.errors import PluginError
from midspan.interface.program import Logprobs, StepOutput, StepResult


def fetch_result(
    output: StepOutput, *, rows: int, vocab_size: int, num_logprobs: int | None, device: str
) -> StepResult:
    """Wait for a step and check its result.

    Args:
        output: what ``Program.run`` returned.
        rows: rows that the batch samples, S.
        vocab_size: token ids are below it.
        num_logprobs: as the batch asked.
        device: id of the device, for the message.

    Raises:
        PluginError: the result breaks the interface; the message says where.
    """
    if not callable(getattr(cast("object", output), "result", None)):
        raise _breach(device, f"Program.run returned {output!r}", "it must be a StepOutput")
    result = output.result()
    if not isinstance(cast("object", result), StepResult):
        raise _breach(device, f"StepOutput.result() returned {result!r}", "it must be a StepResult")
    _check_array(device, "token_ids", result.token_ids, np.dtype(np.int32), (rows,))
    good = np.ones(rows, np.bool_)
    if result.invalid is not None:
        _check_array(device, "invalid", result.invalid, np.dtype(np.bool_), (rows,))
        good = ~result.invalid
    tokens = result.token_ids[good]
    if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise _breach(device, f"StepResult.token_ids holds {wrong}", f"ids are from 0 to {vocab_size - 1}")
    _check_logprobs(device, result.logprobs, rows, None if num_logprobs is None else min(num_logprobs, vocab_size))
    seconds: object = result.device_seconds
    if seconds is not None and not (isinstance(seconds, (int, float)) and 0.0 <= seconds < float("inf")):
        raise _breach(device, f"StepResult.device_seconds is {seconds!r}", "it must be a number of seconds, or None")
    return result


def _check_logprobs(device: str, logprobs: Logprobs | None, rows: int, wanted: int | None) -> None:
    if wanted is None:
        return
    if not isinstance(cast("object", logprobs), Logprobs) or logprobs is None:
        raise _breach(device, f"StepResult.logprobs is {logprobs!r}", f"the batch asked for {wanted}")
    _check_array(device, "logprobs.chosen", logprobs.chosen, np.dtype(np.float32), (rows,))
    _check_array(device, "logprobs.ranks", logprobs.ranks, np.dtype(np.int32), (rows,))
    _check_array(device, "logprobs.top_token_ids", logprobs.top_token_ids, np.dtype(np.int32), (rows, wanted))
    _check_array(device, "logprobs.top", logprobs.top, np.dtype(np.float32), (rows, wanted))


def _check_array(device: str, field: str, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise _breach(device, f"StepResult.{field} is {array!r}", "it must be a numpy array")
    if array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}"
        raise _breach(device, f"StepResult.{field} is {found}", f"it must be {dtype} {list(shape)}")


def _breach(device: str, found: str, wanted: str) -> PluginError:
    name = device.partition(":")[0]
    return PluginError(
        f"A step of the device '{device}' broke the interface: {found}; {wanted}.",
        plugin=name,
        remedy=f"Report it to the makers of the plugin '{name}'; 'midspan doctor --device {device}' shows more.",
    )
