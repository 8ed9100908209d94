"""Cuts cases to what a device claims to take: tokens, requests and context of a step.

Knows the limits in ``Capabilities`` and no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Union

import numpy as np

from midspan.conformance.operation_case import CaseInput, OperationCase
from midspan.interface import OPERATIONS, Capabilities, SamplingBatch

UNLIMITED = 1 << 62


def fit(case: OperationCase, claims: Capabilities) -> Union[OperationCase, str]:
    """The case, with fewer rows where the device's limits ask for it.

    Args:
        case: any case.
        claims: of the device.

    Returns:
        A case within the limits; or, where rows cannot be dropped, which limit is in the way.
    """
    tokens = claims.max_tokens or UNLIMITED
    sampled = min(tokens, claims.max_sampled_rows or UNLIMITED)
    context = claims.max_context or UNLIMITED
    if case.op == "attention":
        return _attention(case, claims)
    if case.op == "sample":
        return replace(case, inputs=_sample(case.inputs, sampled, claims.max_logprobs))
    if case.op == "select_rows":
        x, rows = (np.asarray(value) for value in case.inputs)
        return replace(case, inputs=(x[:tokens], rows[rows < tokens][:sampled]))
    kept = [row for row in range(len(np.asarray(case.inputs[0]))) if row < tokens]
    if case.op == "rotary":
        positions = np.asarray(case.inputs[OPERATIONS["rotary"].inputs.index("positions")])
        kept = [row for row in kept if positions[row] < context]
    if len(kept) == len(np.asarray(case.inputs[0])):
        return case
    return replace(case, inputs=tuple(np.asarray(value)[kept] for value in case.inputs))


def fitting(cases: Sequence[OperationCase], claims: Capabilities) -> list[OperationCase]:
    """The cases that fit, cut where needed."""
    return [case for case in (fit(case, claims) for case in cases) if isinstance(case, OperationCase)]


def _attention(case: OperationCase, claims: Capabilities) -> Union[OperationCase, str]:
    query, lengths = (np.asarray(case.inputs[place]) for place in (0, 4))
    asked = {
        "max_tokens": (len(query), claims.max_tokens),
        "max_requests": (len(lengths), claims.max_requests),
        "max_context": (case.context(), claims.max_context),
    }
    for name, (needed, limit) in asked.items():
        if limit is not None and needed > limit:
            return f"it needs {needed}, and {name} is {limit}"
    if claims.max_context is None or case.cache is None:
        return case
    # A table is never wider than the longest request that the device takes.
    widest = -(-claims.max_context // case.cache.block_size)
    inputs = list(case.inputs)
    inputs[5] = np.asarray(inputs[5])[:, :widest]
    return replace(case, inputs=tuple(inputs))


def _sample(inputs: tuple[CaseInput, ...], rows: int, max_logprobs: int) -> tuple[CaseInput, ...]:
    logits, sampling = inputs
    if not isinstance(sampling, SamplingBatch) or not isinstance(logits, np.ndarray):
        return inputs
    adjustments = sampling.adjustments
    if adjustments is not None:
        kept = adjustments.rows < rows
        adjustments = replace(
            adjustments,
            rows=adjustments.rows[kept],
            token_ids=adjustments.token_ids[kept],
            repetition=adjustments.repetition[kept],
            bias=adjustments.bias[kept],
        )
    wanted = sampling.num_logprobs
    cut = replace(
        sampling,
        temperature=sampling.temperature[:rows],
        top_k=sampling.top_k[:rows],
        top_p=sampling.top_p[:rows],
        min_p=sampling.min_p[:rows],
        seeds=sampling.seeds[:rows],
        positions=sampling.positions[:rows],
        adjustments=adjustments,
        num_logprobs=None if wanted is None else min(wanted, max_logprobs),
    )
    return logits[:rows], cut
