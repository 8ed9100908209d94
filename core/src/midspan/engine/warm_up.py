"""The first steps of a program, run before anybody waits for them.

They touch the padding block only, so that no request ever sees what they wrote.
"""

from __future__ import annotations

import numpy as np

from midspan.devices.step_contract import fetch_result
from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import PADDING_BLOCK, Cache
from midspan.interface.device import Bounds
from midspan.interface.program import Program


def warm_up(program: Program, cache: Cache, bounds: Bounds, vocab_size: int) -> None:
    """Run one step of one token, and one that fills a block.

    Args:
        program: compiled.
        cache: its cache; only padding blocks are written.
        bounds: what it was compiled for.
        vocab_size: for the sampling numbers.
    """
    for tokens in sorted({1, min(bounds.block_size, bounds.max_tokens, bounds.max_context)}):
        output = program.run(_padding_batch(cache, tokens, vocab_size), cache)
        fetch_result(output, rows=1, vocab_size=vocab_size, num_logprobs=None, device=program.placement.device)


def _padding_batch(cache: Cache, tokens: int, vocab_size: int) -> Batch:
    first = PADDING_BLOCK * cache.layout.block_size
    names = [group.name for group in cache.layout.groups]
    return Batch(
        token_ids=np.zeros(tokens, np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        query_starts=np.array([0, tokens], np.int32),
        context_lengths=np.array([tokens], np.int32),
        block_tables={name: np.full((1, 1), PADDING_BLOCK, np.int32) for name in names},
        slots={name: np.arange(first, first + tokens, dtype=np.int32) for name in names},
        rows_to_sample=np.array([tokens - 1], np.int32),
        sampling=SamplingBatch(
            temperature=np.zeros(1, np.float32),
            top_k=np.full(1, vocab_size, np.int32),
            top_p=np.ones(1, np.float32),
            min_p=np.zeros(1, np.float32),
            seeds=np.zeros(1, np.uint64),
            positions=np.full(1, tokens, np.int64),
        ),
    )
