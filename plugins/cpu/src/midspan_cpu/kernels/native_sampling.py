"""Sampling by the native library: each row a task, tokens as the reference defines them.

Exponentials and the order of sums are the library's own, so a token may differ from the
reference's where the random number falls within rounding of a border. What is asked of
one row never changes how another is chosen: logprobs are worked out afterwards, on
the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from midspan.interface import Adjustments, Kernel, KernelSite, SamplingBatch, StepResult
from midspan.runtimes.reference.random_numbers import uniform
from midspan.runtimes.reference.sample_outputs import outputs_of
from midspan.runtimes.reference.sampling import token_logprobs
from midspan.runtimes.torch.portable.sampling import is_plain_greedy
from midspan_cpu.native_interface import SamplingConfig
from midspan_cpu.native_library import NativeLibrary

PRIORITY = 20

Outputs = tuple[torch.Tensor, ...]


def kernels(library: NativeLibrary) -> tuple[Kernel, ...]:
    """The kernel named ``native`` for ``sample``."""

    def prepare(site: KernelSite) -> Callable[[torch.Tensor, SamplingBatch], Outputs]:
        return _Sampler(library)

    return (Kernel(name="native", op="sample", prepare=prepare, priority=PRIORITY),)


class _Sampler:
    """Chooses tokens for float32 logits [S, V]."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._none, self._no_tops = torch.empty(0), torch.empty((0, 0))
        self._no_ids, self._no_top_ids = self._none.int(), self._no_tops.int()

    def __call__(self, logits: torch.Tensor, sampling: SamplingBatch) -> Outputs:
        rows, columns = logits.shape
        ids, failed = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.bool)
        if rows:
            where = (logits.data_ptr(), logits.stride(0), rows, columns, ids.data_ptr(), failed.data_ptr())
            if is_plain_greedy(sampling):
                self._library.argmax(*where)
            else:
                config, _held = _configuration(sampling)
                self._library.sample(config, *where)
        if sampling.num_logprobs is None:
            return ids, self._none, self._no_ids, self._no_top_ids, self._no_tops, failed
        tokens, invalid = ids.numpy(), failed.numpy()
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            found = token_logprobs(logits.numpy(), tokens, ~invalid, sampling.num_logprobs)
        arrays = outputs_of(StepResult(token_ids=tokens, logprobs=found, invalid=invalid))
        return tuple(torch.from_numpy(array) for array in arrays)


def _configuration(sampling: SamplingBatch) -> tuple[SamplingConfig, list[NDArray[Any]]]:
    """The library's record, and the arrays whose addresses it holds."""
    held: list[NDArray[Any]] = []

    def address(array: NDArray[Any] | None, dtype: type) -> int | None:
        if array is None:
            return None
        held.append(np.ascontiguousarray(array, dtype))
        return held[-1].ctypes.data

    starts, edits = _edits(sampling.adjustments, len(sampling.temperature))
    config = SamplingConfig(
        temperature=address(sampling.temperature, np.float32),
        top_k=address(sampling.top_k, np.int32),
        top_p=address(sampling.top_p, np.float32),
        min_p=address(sampling.min_p, np.float32),
        numbers=address(uniform(sampling.seeds, sampling.positions), np.float32),
        edit_starts=address(starts, np.int32),
        edit_ids=None if edits is None else address(edits.token_ids, np.int32),
        edit_repetition=None if edits is None else address(edits.repetition, np.float32),
        edit_bias=None if edits is None else address(edits.bias, np.float32),
        allowed=address(sampling.allowed, np.uint32),
        allowed_words=0 if sampling.allowed is None else sampling.allowed.shape[1],
        targets=None if sampling.has_target is None else address(sampling.targets, np.int32),
        has_target=address(sampling.has_target, np.uint8),
    )
    return config, held


def _edits(adjustments: Adjustments | None, rows: int) -> tuple[NDArray[np.int32] | None, Adjustments | None]:
    """Edits by rising row, and where each row's begin."""
    if adjustments is None or not len(adjustments.rows):
        return None, None
    order = np.argsort(adjustments.rows, kind="stable")
    starts = np.searchsorted(adjustments.rows[order], np.arange(rows + 1)).astype(np.int32)
    return starts, Adjustments(
        rows=adjustments.rows[order],
        token_ids=adjustments.token_ids[order],
        repetition=adjustments.repetition[order],
        bias=adjustments.bias[order],
    )
