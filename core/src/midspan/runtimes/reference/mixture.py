"""Definitions of the mixture of experts: who is chosen, and what the chosen make of a row.

Called as the other operations are. Knows no graph and no model.

Invariant: a row's result is a function of that row alone: each product is a matrix times one row.
Sources: the sparsely gated layer (arXiv 1701.06538), its form in Mixtral (2401.04088), and the
choice by groups with a correction of the ranking alone in DeepSeek-V3 (2412.19437).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.runtimes.reference.activations import ACTIVATIONS

Array = NDArray[Any]
Float32 = NDArray[np.float32]

SMALLEST_SUM = np.float32(1e-20)
"""Added to a sum by which shares are divided."""


def route(
    logits: Array,
    bias: Array | None = None,
    *,
    top_k: int,
    scoring: str,
    normalize: bool,
    groups: int,
    top_groups: int,
    group_scoring: str,
    scale: float,
) -> tuple[NDArray[np.int32], Float32]:
    """Choose experts for each row.

    Args:
        logits: [N, experts], any floating type.
        bias: [experts], added to the scores where experts are ranked.
        top_k: experts for each row.
        scoring: ``softmax`` over all experts, or ``sigmoid``.
        normalize: chosen scores are divided by their sum.
        groups: equal parts of consecutive experts.
        top_groups: groups from which can be chosen.
        group_scoring: a group counts as much as its ``largest`` or its ``two_largest`` together.
        scale: factor of the shares.

    Returns:
        Numbers of experts, int32 [N, top_k], best first; their shares, float32 [N, top_k].
    """
    wide: Float32 = logits.astype(np.float32, copy=False)
    scores = _softmax(wide) if scoring == "softmax" else ACTIVATIONS["sigmoid"](wide)
    ranking: Float32 = scores if group_scoring == "two_largest" else wide
    if bias is not None:
        ranking = scores + bias.astype(np.float32, copy=False)
    if groups > 1:
        ranking = _within_groups(ranking, groups, top_groups, 2 if group_scoring == "two_largest" else 1)
    chosen = _largest(ranking, top_k)
    shares: Float32 = np.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        shares = shares / (np.sum(shares, axis=-1, keepdims=True) + SMALLEST_SUM)
    return chosen.astype(np.int32), shares * np.float32(scale)


def experts(
    x: Array,
    expert_ids: NDArray[np.int32],
    expert_weights: Float32,
    gate_up: Array,
    down: Array,
    gate_up_bias: Array | None = None,
    down_bias: Array | None = None,
    *,
    function: str,
    limit: float | None,
    slope: float,
    up_offset: float,
) -> Array:
    """The sum of what the chosen experts make of each row, times their shares.

    Args:
        x: [N, hidden], in the activation type.
        expert_ids: int32 [N, chosen].
        expert_weights: float32 [N, chosen].
        gate_up: [experts, 2 * inner, hidden].
        down: [experts, hidden, inner].
        gate_up_bias: [experts, 2 * inner].
        down_bias: [experts, hidden].
        function: of the gate, one of ``ACTIVATIONS``.
        limit: largest gate and largest size of up; None: no limit.
        slope: of the gate inside of the function.
        up_offset: added to up.

    Returns:
        [N, hidden] in x's type: float32 sums in the order of ``expert_ids``, rounded once.
    """
    rows: Float32 = np.ascontiguousarray(x.astype(np.float32, copy=False))
    total = np.zeros(rows.shape, np.float32)
    for row in range(rows.shape[0]):
        for expert, share in zip(expert_ids[row], expert_weights[row], strict=True):
            middle = _wide(gate_up[expert]) @ rows[row]
            if gate_up_bias is not None:
                middle = middle + _wide(gate_up_bias[expert])
            gate, up = np.split(middle, 2)
            if limit is not None:
                gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
            gate = ACTIVATIONS[function](gate * np.float32(slope)) / np.float32(slope)
            made = _wide(down[expert]) @ (gate * (up + np.float32(up_offset)))
            if down_bias is not None:
                made = made + _wide(down_bias[expert])
            total[row] += share * made
    return total.astype(x.dtype, copy=False)


def _wide(x: Array) -> Float32:
    return x.astype(np.float32, copy=False)


def _softmax(x: Float32) -> Float32:
    powers: Float32 = np.exp(x - np.max(x, axis=-1, keepdims=True))
    shares: Float32 = powers / np.sum(powers, axis=-1, keepdims=True)
    return shares


def _largest(ranking: Float32, count: int) -> NDArray[np.int64]:
    """Columns of the largest numbers of each row, the lower column first among equals; what is no number comes last."""
    order: NDArray[np.int64] = np.argsort(-ranking, axis=-1, kind="stable")[:, :count]
    return order


def _within_groups(ranking: Float32, groups: int, kept: int, summed: int) -> Float32:
    """The ranking, with minus infinity outside of the best groups."""
    parts = ranking.reshape(ranking.shape[0], groups, ranking.shape[1] // groups)
    best = np.sum(-np.sort(-parts, axis=-1)[..., :summed], axis=-1)
    allowed = np.zeros(best.shape, np.bool_)
    np.put_along_axis(allowed, _largest(best, kept), True, axis=-1)
    limited: Float32 = np.where(allowed[..., None], parts, np.float32(-np.inf)).reshape(ranking.shape)
    return limited
