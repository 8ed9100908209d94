"""What one step asks of a device: flat and ragged, ints and sampling numbers.

All arrays are host numpy arrays, C-contiguous. T is the number of tokens in the
step, prefill and decode together (there are no phases), B the number of
requests, S the number of rows to sample. A batch knows no request's name and
no text.

The arrays are the program's once they were given to it: the core changes none of them.

Invariants: ``query_starts[0] == 0``, it increases strictly and ends with T;
``context_lengths[b]`` counts the tokens of request b in the cache once this
step's own tokens are written, so the last token of request b has position
``context_lengths[b] - 1``, and its tokens' positions are consecutive;
``rows_to_sample`` indexes T and increases strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midspan.interface.cache import CacheGroup

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adjustments:
    """Sparse edits of logits; each (row, token) pair appears once at most.

    Attributes:
        rows: int32 [E], which sampled row.
        token_ids: int32 [E], which token of the vocabulary.
        repetition: float32 [E], factor of the repetition penalty, 1 for none: a
            positive logit is divided by it, another is multiplied by it.
        bias: float32 [E], added after that; minus infinity forbids the token.
    """

    rows: Int32Array
    token_ids: Int32Array
    repetition: Float32Array
    bias: Float32Array


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplingBatch:
    """How to choose a token for each of the S rows.

    The definition of the whole procedure, which every device must follow, is
    ``midspan.runtimes.reference.sampling``.

    Attributes:
        temperature: float32 [S]; 0 means greedy (the largest logit, the lowest
            id among equals).
        top_k: int32 [S]; the vocabulary size means no limit.
        top_p: float32 [S]; 1 means no limit.
        min_p: float32 [S]; 0 means no limit.
        seeds: uint64 [S].
        positions: int64 [S], the position in the sequence of the token to be chosen; the
            random number is a function of (seed, position) alone.
        adjustments: sparse edits of the logits, or None.
        allowed: uint32 [S, ceil(V / 32)], bit ``t % 32`` of word ``t // 32`` says that
            token t may be chosen; None means all may.
        num_logprobs: how many top logprobs to return for every row (0: only the chosen
            token's own); None: no logprobs at all.
        targets: int32 [S], for rows that are not sampled: the row's token is its target, and
            what is wanted is the target's logprob (prompt scoring). None when no row is so.
        has_target: bool [S], which rows those are; None together with ``targets``.
    """

    temperature: Float32Array
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]
    adjustments: Adjustments | None = None
    allowed: NDArray[np.uint32] | None = None
    num_logprobs: int | None = None
    targets: Int32Array | None = None
    has_target: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One step.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T].
        query_starts: int32 [B + 1], where each request's tokens begin in T.
        context_lengths: int32 [B].
        block_tables: per cache group, int32 [B, M]: the blocks that hold the request's
            tokens, in order; entry i holds positions ``i * block_size`` and on. Unused
            entries, and entries wholly before a window, are the padding block. M is what this
            step needs, or more: columns from ``ceil(max_context / block_size)`` on hold
            padding blocks alone and may be cut off.
        slots: per cache group, int32 [T]: where each token's key and value are
            written, ``block * block_size + offset``; in no order. No two are equal.
        rows_to_sample: int32 [S].
        sampling: how to choose for those rows.
    """

    token_ids: Int32Array
    positions: Int32Array
    query_starts: Int32Array
    context_lengths: Int32Array
    block_tables: Mapping[str, Int32Array]
    slots: Mapping[str, Int32Array]
    rows_to_sample: Int32Array
    sampling: SamplingBatch

    def graph_input(self, name: str) -> Int32Array | SamplingBatch:
        """The array for a graph input's name, see ``graph_input_names``."""
        field, _, group = name.partition(".")
        if group:
            tables: Mapping[str, Int32Array] = getattr(self, field)
            return tables[group]
        value: Int32Array | SamplingBatch = getattr(self, field)
        return value


def graph_input_names(groups: tuple[CacheGroup, ...]) -> tuple[str, ...]:
    """Names of the graph inputs, in order: the fields of a batch, tables per group."""
    names = ["token_ids", "positions", "query_starts", "context_lengths"]
    names += [f"block_tables.{group.name}" for group in groups]
    names += [f"slots.{group.name}" for group in groups]
    return (*names, "rows_to_sample", "sampling")
