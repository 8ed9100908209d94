"""How a token is chosen from logits: the definition that every device follows.

Numpy only; knows no request, no text and no history. Written as the definition,
yet fast enough to serve devices that have no sampler of their own.

For each row, from its float32 logits ``l[0..V)``:

1. A row with a NaN or plus infinity, or with nothing but minus infinity, is
   *invalid*. So is one for which step 3 leaves no finite logit.
2. Logprobs come from the raw logits: ``l - max - log(sum(exp(l - max)))``, the
   exponentials in float32, everything else in float64, rounded to float32 at the
   end. Ranks and top tokens follow the order (logit falling, id rising).
   A row with a target returns the target, and the rest does not apply to it.
3. Adjustments: a positive logit is divided by the repetition factor, another is
   multiplied by it; then the bias is added. Tokens outside the allowed mask
   become minus infinity.
4. Temperature 0: the largest logit, the lowest id among equals.
5. Otherwise the first ``top_k`` in the order (logit falling, id rising) are kept,
   with weights ``w = exp((l - max) / temperature)`` in float32, so the largest is 1.
6. ``min_p`` keeps weights of at least ``min_p`` (times the largest, which is 1).
7. ``top_p`` keeps the shortest beginning of the order (weight falling, id rising)
   whose sum reaches ``top_p`` times the sum of what steps 5 and 6 kept; at least one.
8. With ``u = uniform(seed, position)``: the first id, in rising order, at which the
   cumulated weight exceeds ``u`` times the sum of the kept weights.

Sums are float64. A device may add in another order or take its exponentials
otherwise; it then differs only where ``u`` falls within rounding of a border.

Invariants: a row's outcome is a function of that row alone, bit for bit, because
everything that is rounded is computed row by row. Logits are never written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import Adjustments, SamplingBatch
from midspan.interface.program import Logprobs, StepResult
from midspan.runtimes.reference.random_numbers import uniform

FloatRow = NDArray[np.float32]
IdRow = NDArray[np.intp]

_SUM_BLOCK = 128
"""Weights that are added in one go; a multiple of nothing but convenience."""

_GROUPS = 64
"""Members of a group whose largest is taken to bound the k-th largest of a row from below."""


def sample(logits: NDArray[np.float32], sampling: SamplingBatch) -> StepResult:
    """Choose a token for each row.

    Args:
        logits: float32 [S, V]; not changed.
        sampling: how, see ``SamplingBatch``.

    Returns:
        Tokens, logprobs where asked for, and which rows are invalid (None: none is).
    """
    logits = np.ascontiguousarray(logits, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        tokens, valid = _choose(logits, sampling)
        logprobs = None
        if sampling.num_logprobs is not None:
            logprobs = token_logprobs(logits, tokens, valid, sampling.num_logprobs)
    tokens[~valid] = 0
    return StepResult(
        token_ids=tokens.astype(np.int32), logprobs=logprobs, invalid=None if bool(valid.all()) else ~valid
    )


def _choose(logits: FloatRow, sampling: SamplingBatch) -> tuple[IdRow, NDArray[np.bool_]]:
    """Tokens [S] and which rows are valid [S]."""
    greedy = sampling.temperature == 0.0
    targets = sampling.targets if sampling.has_target is not None else None
    if sampling.adjustments is None and sampling.allowed is None and targets is None and bool(greedy.all()):
        tokens = logits.argmax(axis=1)
        return tokens, np.isfinite(logits[np.arange(len(logits)), tokens])
    tokens = np.zeros(len(logits), np.intp)
    valid = np.zeros(len(logits), np.bool_)
    edits = _edits_by_row(sampling.adjustments, len(logits))
    numbers = None if bool(greedy.all()) else uniform(sampling.seeds, sampling.positions)
    for row in range(len(logits)):
        raw = logits[row]
        if targets is not None and sampling.has_target is not None and sampling.has_target[row]:
            tokens[row], valid[row] = targets[row], np.isfinite(raw.max())
            continue
        edited = _edit(raw, edits[row], sampling.allowed[row] if sampling.allowed is not None else None)
        best = edited.argmax()
        valid[row] = np.isfinite(edited[best]) and (edited is raw or np.isfinite(raw.max()))
        if greedy[row] or numbers is None or not valid[row]:
            tokens[row] = best
        else:
            tokens[row] = _draw(
                edited,
                edited[best],
                temperature=sampling.temperature[row],
                top_k=int(sampling.top_k[row]),
                top_p=float(sampling.top_p[row]),
                min_p=sampling.min_p[row],
                number=float(numbers[row]),
            )
    return tokens, valid


def _draw(
    logits: FloatRow,
    largest: np.float32,
    *,
    temperature: np.float32,
    top_k: int,
    top_p: float,
    min_p: np.float32,
    number: float,
) -> int:
    """Steps 5 to 8 for one valid row."""
    ids: IdRow | None = None
    if 0 < top_k < len(logits):
        ids = largest_ids(logits, top_k)
        logits = logits[ids]
    weights = logits - largest
    if temperature != 1.0:
        np.divide(weights, temperature, out=weights)
    np.exp(weights, out=weights)
    if min_p > 0.0:
        ids, weights = _keep(np.flatnonzero(weights >= min_p), ids, weights)
    if top_p < 1.0:
        ids, weights = _keep(_nucleus(weights, top_p), ids, weights)
    place = _inverse(weights, number)
    return place if ids is None else int(ids[place])


def _keep(places: IdRow, ids: IdRow | None, weights: FloatRow) -> tuple[IdRow, FloatRow]:
    return (places if ids is None else ids[places]), weights[places]


def largest_ids(values: FloatRow, count: int) -> IdRow:
    """Places of the first ``count`` in the order (value falling, place rising), in rising order.

    Args:
        values: float32 [V], no NaN.
        count: 1 to V.

    Returns:
        intp [count].
    """
    # The k-th largest of the groups' maxima is at most the k-th largest value, so nothing
    # below it can be kept, and the exact selection runs on what few values remain.
    groups = len(values) // _GROUPS
    places: IdRow | None = None
    candidates = values
    if count <= groups:
        maxima = values[: groups * _GROUPS].reshape(_GROUPS, groups).max(axis=0)
        places = np.flatnonzero(values >= np.partition(maxima, groups - count)[groups - count])
        candidates = values[places]
    last = np.partition(candidates, len(candidates) - count)[len(candidates) - count]
    kept = candidates > last
    equal = np.flatnonzero(candidates == last)
    kept[equal[: count - np.count_nonzero(kept)]] = True
    chosen = np.flatnonzero(kept)
    return chosen if places is None else places[chosen]


def _nucleus(weights: FloatRow, top_p: float) -> IdRow:
    """Places that top_p keeps, in rising order.

    Only values are sorted, not places: what is kept is everything above the last kept
    value, and as many of its equals as still fit, lowest places first. Weights below
    ``(1 - top_p) * total / V`` weigh less than ``(1 - top_p) * total`` together, so the
    beginning that reaches ``top_p * total`` lies wholly above that line, and only
    what is above it is sorted. (Were the line off by a rounding, the sum tells.)
    """
    total = _BlockSums(weights).total()
    wanted = top_p * total
    for line in ((1.0 - top_p) * total / len(weights), 0.0):
        candidates = np.flatnonzero(weights >= line)
        found = weights[candidates]
        values = np.sort(found)[::-1]
        place = _BlockSums(values).crossing(wanted, "left")
        if place < len(values):
            break
    last = values[min(place, len(values) - 1)]
    kept = found > last
    equal = np.flatnonzero(found == last)
    kept[equal[: place + 1 - np.count_nonzero(kept)]] = True
    nucleus: IdRow = candidates[kept]
    return nucleus


def _inverse(weights: FloatRow, number: float) -> int:
    """First place whose cumulated weight exceeds ``number`` times the sum."""
    sums = _BlockSums(weights)
    return sums.crossing(number * sums.total(), "right")


class _BlockSums:
    """Cumulated float64 sums of a row of weights, worked out only in the block where they are looked at."""

    def __init__(self, weights: FloatRow) -> None:
        blocks = -(-len(weights) // _SUM_BLOCK)
        self._length = len(weights)
        self._padded = np.empty(blocks * _SUM_BLOCK, np.float64)
        self._padded[: len(weights)] = weights
        self._padded[len(weights) :] = 0.0
        self._borders = np.cumsum(self._padded.reshape(blocks, _SUM_BLOCK).sum(axis=1))

    def total(self) -> float:
        return float(self._borders[-1])

    def crossing(self, wanted: float, side: Literal["left", "right"]) -> int:
        """First place at which the sum reaches ("left") or exceeds ("right") a value; the length if none does."""
        block = int(np.searchsorted(self._borders, wanted, side=side))
        if block == len(self._borders):
            return self._length
        start = block * _SUM_BLOCK
        within = self._padded[start : start + _SUM_BLOCK]
        before = self._borders[block - 1] if block else 0.0
        place = int(np.searchsorted(before + np.cumsum(within), wanted, side=side))
        if place == len(within):
            # The block's sum, added in another order, came out a rounding larger than this one.
            place = int(np.flatnonzero(within)[-1])
        return start + place


Edit = tuple[NDArray[np.int32], FloatRow, FloatRow]


def _edits_by_row(adjustments: Adjustments | None, rows: int) -> Sequence[Edit | None]:
    """For each row its (token ids, repetition, bias), or None."""
    edits: list[Edit | None] = [None] * rows
    if adjustments is None or not len(adjustments.rows):
        return edits
    order = np.argsort(adjustments.rows, kind="stable")
    starts = np.searchsorted(adjustments.rows[order], np.arange(rows + 1))
    for row in range(rows):
        mine = order[starts[row] : starts[row + 1]]
        if len(mine):
            edits[row] = (adjustments.token_ids[mine], adjustments.repetition[mine], adjustments.bias[mine])
    return edits


def _edit(raw: FloatRow, edit: Edit | None, allowed: NDArray[np.uint32] | None) -> FloatRow:
    """Step 3 for one row: the row itself when nothing changes it, otherwise a copy."""
    edited = raw
    if edit is not None:
        token_ids, repetition, bias = edit
        values = raw[token_ids]
        edited = raw.copy()
        edited[token_ids] = np.where(values > 0.0, values / repetition, values * repetition) + bias
    if allowed is not None:
        bits = np.unpackbits(allowed.astype("<u4").view(np.uint8), count=len(raw), bitorder="little")
        edited = np.where(bits, edited, np.float32(-np.inf))
    return edited


def token_logprobs(logits: FloatRow, tokens: NDArray[Any], valid: NDArray[np.bool_], count: int) -> Logprobs:
    """Step 2 for all rows; an invalid row gets minus infinity, rank 0 and the first ids.

    Args:
        logits: float32 [S, V], before any edit.
        tokens: integers [S], what was chosen.
        valid: bool [S].
        count: how many top logprobs.
    """
    rows, width = len(logits), min(count, logits.shape[1])
    chosen = np.full(rows, -np.inf, np.float32)
    ranks = np.zeros(rows, np.int32)
    top_ids = np.zeros((rows, width), np.int32)
    top_ids[:] = np.arange(width)
    top = np.full((rows, width), -np.inf, np.float32)
    for row in np.flatnonzero(valid):
        values = logits[row]
        largest = values.max()
        weights = values - largest
        np.exp(weights, out=weights)
        offset = float(largest) + np.log(_BlockSums(weights).total())
        token = tokens[row]
        value = values[token]
        chosen[row] = value - offset
        ranks[row] = 1 + np.count_nonzero(values > value) + np.count_nonzero(values[:token] == value)
        if width:
            ids = largest_ids(values, width)
            ids = ids[np.argsort(-values[ids], kind="stable")]
            top_ids[row] = ids
            top[row] = values[ids] - offset
    return Logprobs(chosen=chosen, ranks=ranks, top_token_ids=top_ids, top=top)
