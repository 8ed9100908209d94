"""Whether generated tokens are those that the definitions give.

The reference runs what a device generated, token by token as the device had it before it
(teacher forcing), and gives the logits in float32. So one wrong token is told from those that
follow from it, and every element type is judged by the same rule.

How far may a device's logits lie from these? Call that E. The reference itself, when it rounds to the
device's element types, is off by D at most over all rows and tokens. A device that rounds to the
same types, elsewhere or more often, draws its errors from the same distribution: E = 2 D is
allowed. What it adds in another order is float32 arithmetic, whose error in a sum of n terms is
at most n units (Higham, chapter 3) where D16, the reference's error in float16, comes from about one unit of
2^-11 in each value: n D16 2^-13 more. Then, with l the reference's logits:

* greedy: l[token] >= max(l) - 2 E, for the device saw both off by E at most;
* sampled at temperature t: weights are off by exp(+-E / t), so the cumulated share is off by
  d = exp(2 E / t) - 1 at most, and the token's share must reach u within d;
* a logprob is off by 2 E: the logit, and the logarithm of the sum.

For float32, E is a few 10^-4, far below the distance of a random model's best logits: there the
tokens are equal to the reference's. Knows no device but the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.check import CheckFailed
from midspan.conformance.engine_drive import Generated
from midspan.conformance.tiny_model import TinyModel
from midspan.engine.messages import TokenScores
from midspan.interface import Batch, Bounds, CacheLayout, DeviceInfo, SamplingBatch
from midspan.runtimes.reference.device import ReferenceDevice
from midspan.runtimes.reference.random_numbers import uniform

BLOCK_SIZE = 16
_INFO = DeviceInfo(id="reference", description="the definitions", memory_bytes=0)
_FLOAT32_ROUNDINGS = 16.0 * 2.0**-24
"""Of a logprob itself, relative to 1 + its magnitude."""

Rows = NDArray[np.float32]


class ReferenceJudge:
    """The definitions' opinion of what a model generated.

    Args:
        model: which.
    """

    def __init__(self, model: TinyModel) -> None:
        self._model = model
        self._device = ReferenceDevice(_INFO)

    def judge(self, found: Sequence[Generated], dtype: str, cache_dtype: str) -> None:
        """Hold tokens and logprobs against the definitions.

        Args:
            found: sequences that ended well.
            dtype, cache_dtype: the types that the device computed with.

        Raises:
            CheckFailed: something is off by more than it may be; the message says where.
        """
        for place, generated in enumerate(found):
            _require_whole(place, generated)
        exact = self.logits(found, "float32", "float32")
        allowed = self.tolerance(found, exact, dtype, cache_dtype)
        for place, (generated, rows) in enumerate(zip(found, exact, strict=True)):
            _judge_tokens(place, generated, rows, allowed)
            _judge_scores(place, generated, rows, allowed)

    def logits(self, found: Sequence[Generated], dtype: str, cache_dtype: str) -> list[Rows]:
        """For each sequence float32 [length, vocabulary]: row p was computed from tokens 0 to p."""
        longest = max(len(generated.sequence()) for generated in found)
        total = sum(len(generated.sequence()) for generated in found)
        graph = self._model.graph
        bounds = Bounds(
            max_tokens=total,
            max_requests=len(found),
            max_context=longest,
            max_sampled_rows=total,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        program = self._device.compile(graph, self._model.weights(), bounds)
        layout = CacheLayout(groups=graph.cache, block_size=BLOCK_SIZE, dtype=cache_dtype)
        blocks = 1 + sum(-(-len(generated.sequence()) // BLOCK_SIZE) for generated in found)
        cache = self._device.allocate_cache(layout, (blocks,) * len(graph.cache))
        name = next(node.inputs[0] for node in graph.nodes if node.op == "sample")
        rows = program.values(self._batch([generated.sequence() for generated in found]), cache, [name])[name]
        self._device.close()
        ends = np.cumsum([len(generated.sequence()) for generated in found])
        return list(np.split(np.asarray(rows, np.float32), ends[:-1]))

    def tolerance(self, found: Sequence[Generated], exact: Sequence[Rows], dtype: str, cache_dtype: str) -> float:
        """E: how far a device's logits may lie from the reference's in float32."""
        longest = max(len(generated.sequence()) for generated in found)
        terms = max(longest, *(max(weight.shape) for weight in self._model.graph.weights.values()))
        half = _distance(self.logits(found, "float16", "float16"), exact)
        arithmetic = terms * half * 2.0**-13
        if (dtype, cache_dtype) == ("float32", "float32"):
            return arithmetic
        return 2.0 * _distance(self.logits(found, dtype, cache_dtype), exact) + arithmetic

    def _batch(self, sequences: Sequence[Sequence[int]]) -> Batch:
        counts = np.array([len(tokens) for tokens in sequences], np.int32)
        needed = -(-counts // BLOCK_SIZE)
        firsts = 1 + np.cumsum(needed) - needed
        table = firsts[:, None] + np.arange(int(needed.max()))
        table = np.where(np.arange(int(needed.max())) < needed[:, None], table, 0).astype(np.int32)
        positions = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
        slots = (np.repeat(firsts, counts) * BLOCK_SIZE + positions).astype(np.int32)
        names = [group.name for group in self._model.graph.cache]
        return Batch(
            token_ids=np.concatenate([np.asarray(tokens) for tokens in sequences]).astype(np.int32),
            positions=positions,
            query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            context_lengths=counts,
            block_tables=dict.fromkeys(names, table),
            slots=dict.fromkeys(names, slots),
            rows_to_sample=np.arange(len(positions), dtype=np.int32),
            sampling=greedy(len(positions), self._model.graph.vocab_size),
        )


def greedy(rows: int, vocab_size: int, num_logprobs: int | None = None) -> SamplingBatch:
    """Sampling numbers for the largest logit of each row."""
    return SamplingBatch(
        temperature=np.zeros(rows, np.float32),
        top_k=np.full(rows, vocab_size, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seeds=np.zeros(rows, np.uint64),
        positions=np.arange(rows, dtype=np.int64),
        num_logprobs=num_logprobs,
    )


def _distance(one: Sequence[Rows], other: Sequence[Rows]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def _require_whole(place: int, generated: Generated) -> None:
    if generated.error is not None:
        raise CheckFailed(f"Request {place} failed: {generated.error}")
    if len(generated.tokens) != generated.request.outputs:
        raise CheckFailed(
            f"Request {place} generated {len(generated.tokens)} tokens instead of {generated.request.outputs}."
        )


def _judge_tokens(place: int, generated: Generated, rows: Rows, allowed: float) -> None:
    start = len(generated.request.prompt)
    temperature = generated.request.temperature
    for offset, token in enumerate(generated.tokens):
        row = rows[start + offset - 1].astype(np.float64)
        where = f"Request {place}, sequence {generated.index}, token {offset} of {len(generated.tokens)}"
        if temperature == 0.0:
            behind = float(row.max() - row[token])
            if behind > 2.0 * allowed:
                raise CheckFailed(
                    f"{where} is {token}, and the reference's choice after the same tokens is {int(row.argmax())}, "
                    f"whose logit is larger by {behind:.4g}; rounding explains {2.0 * allowed:.2g}."
                )
            continue
        number = float(uniform(np.array([generated.seed], np.uint64), np.array([start + offset], np.int64))[0])
        shares = np.cumsum(np.exp((row - row.max()) / temperature))
        shares = np.concatenate(([0.0], shares / shares[-1]))
        slack = float(np.expm1(2.0 * allowed / temperature)) + _FLOAT32_ROUNDINGS
        if not shares[token] - slack <= number <= shares[token + 1] + slack:
            wanted = int(np.searchsorted(shares, number, side="right")) - 1
            raise CheckFailed(
                f"{where} is {token}, drawn at temperature {temperature} with seed {generated.seed}; the definition "
                f"draws {wanted} with the number {number:.6f}."
            )


def _judge_scores(place: int, generated: Generated, rows: Rows, allowed: float) -> None:
    start = len(generated.request.prompt)
    where = f"Request {place}, sequence {generated.index}"
    if generated.request.logprobs is not None:
        if [score.token_id for score in generated.scores] != generated.tokens:
            raise CheckFailed(f"{where}: the logprobs are not those of its tokens.")
        for offset, score in enumerate(generated.scores):
            _judge_score(f"{where}, token {offset}", score, rows[start + offset - 1], allowed)
    if generated.request.prompt_logprobs is not None and generated.index == 0:
        scores = generated.prompt_scores or []
        if [score.token_id for score in scores] != list(generated.request.prompt[1:]):
            raise CheckFailed(f"{where}: the prompt's logprobs are not those of its tokens.")
        for offset, score in enumerate(scores):
            _judge_score(f"{where}, prompt token {offset + 1}", score, rows[offset], allowed)


def _judge_score(where: str, score: TokenScores, row: Rows, allowed: float) -> None:
    wide = row.astype(np.float64)
    logprobs = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    for token, value in [(score.token_id, score.logprob), *zip(score.top_ids, score.top, strict=True)]:
        margin = 2.0 * allowed + _FLOAT32_ROUNDINGS * (1.0 + abs(logprobs[token]))
        if not abs(value - logprobs[token]) <= margin:
            raise CheckFailed(
                f"{where}: the logprob of {token} is {value:.6g} and the reference's is {logprobs[token]:.6g}; "
                f"rounding explains {margin:.2g}."
            )
    own = wide[score.token_id]
    better, level = np.count_nonzero(wide > own + 2.0 * allowed), np.count_nonzero(wide >= own - 2.0 * allowed)
    if not better < score.rank <= level:
        raise CheckFailed(f"{where}: its rank is {score.rank} and the reference's lies from {better + 1} to {level}.")
    if score.top_ids:
        least = np.sort(wide)[-len(score.top_ids)]
        if min(wide[token] for token in score.top_ids) < least - 2.0 * allowed or len(set(score.top_ids)) < len(
            score.top_ids
        ):
            raise CheckFailed(f"{where}: {score.top_ids} are not the most probable tokens.")
