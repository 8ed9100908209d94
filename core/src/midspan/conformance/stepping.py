"""One step of a tiny model, again and again, straight on a device: no scheduler and no engine.

For checks that look at what a device does with its resources. The step runs three prompts and
writes the same data to the same slots each time.
"""

from __future__ import annotations

import numpy as np

from midspan.conformance.engine_drive import DriveSettings
from midspan.conformance.reference_judge import greedy
from midspan.conformance.tiny_model import TinyModel, tiny_model
from midspan.interface import Batch, CacheLayout, Device, StepResult

PROMPTS = 3
TOKENS = 5
"""Of each prompt."""
FILLED_AT_ONCE = 2048
"""Blocks that are written together."""


class Stepping:
    """A program, a cache, and a batch for them.

    Args:
        device: where; it closes nothing by itself.
        model: what to run; None: the plain one.
        cache_bytes: the least that the cache holds.

    Attributes:
        program, cache: open until ``close``.
        batch: what each step runs.
    """

    def __init__(self, device: Device, model: TinyModel | None = None, *, cache_bytes: int = 0) -> None:
        chosen = tiny_model("plain") if model is None else model
        bounds = DriveSettings().bounds(device)
        self.layout = CacheLayout(groups=chosen.graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype)
        prompts = min(PROMPTS, bounds.max_requests)
        tokens = min(TOKENS, bounds.max_context, bounds.max_tokens // prompts)
        per_prompt = -(-tokens // bounds.block_size)
        each = sum(device.block_bytes(self.layout))
        blocks = max(1 + prompts * per_prompt, -(-cache_bytes // each))
        self.program = device.compile(chosen.graph, chosen.weights(), bounds)
        self.cache = device.allocate_cache(self.layout, (blocks,) * len(chosen.graph.cache))
        self.batch = _batch(chosen, prompts, tokens, bounds.block_size, per_prompt)

    def step(self) -> StepResult:
        """Run the batch and fetch its result."""
        return self.program.run(self.batch, self.cache).result()

    def fill_cache(self) -> None:
        """Write every block, so that memory that is taken when it is first used is taken."""
        for group, count in zip(self.layout.groups, self.cache.blocks, strict=True):
            size = max(group.key_size, group.value_size)
            for start in range(0, count, FILLED_AT_ONCE):
                blocks = range(start, min(count, start + FILLED_AT_ONCE))
                shape = (group.layers, 2, len(blocks), self.layout.block_size, group.kv_heads, size)
                self.cache.write(group.name, blocks, np.zeros(shape, np.float32))

    def close(self) -> None:
        """Give program and cache back."""
        self.cache.close()
        self.program.close()


def _batch(model: TinyModel, prompts: int, tokens: int, block_size: int, per_prompt: int) -> Batch:
    table = 1 + np.arange(prompts * per_prompt, dtype=np.int32).reshape(prompts, per_prompt)
    positions = np.tile(np.arange(tokens, dtype=np.int32), prompts)
    slots = (np.repeat(table[:, 0] * block_size, tokens) + positions).astype(np.int32)
    names = [group.name for group in model.graph.cache]
    ends = np.arange(1, prompts + 1, dtype=np.int32) * tokens
    return Batch(
        token_ids=(1 + np.arange(prompts * tokens, dtype=np.int32) % (model.graph.vocab_size - 1)).astype(np.int32),
        positions=positions,
        query_starts=np.concatenate(([0], ends)).astype(np.int32),
        context_lengths=np.full(prompts, tokens, np.int32),
        block_tables=dict.fromkeys(names, table),
        slots=dict.fromkeys(names, slots),
        rows_to_sample=(ends - 1).astype(np.int32),
        sampling=greedy(prompts, model.graph.vocab_size),
    )
