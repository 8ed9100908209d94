"""The same bits again, alone or in company, and steps that are started before others are fetched.

What is compared here is bits, of tokens and of logprobs; whether they are the right ones is the engine
level's business. The last check holds for every device: ``Program.run`` may be called
before an earlier step's result was fetched, whether or not steps overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from midspan.conformance import loads
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.engine_drive import (
    DriveSettings,
    Generated,
    LoadRequest,
    ProgramShelf,
    drive,
    engine_on,
)
from midspan.conformance.levels.engine import needs_block, needs_requests
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import TinyModel, tiny_model
from midspan.interface import Batch, Cache, CacheLayout, FinishedStep, Program, StepOutput, StepResult

LEVEL = "determinism"
MODELS = ("plain", "windowed")


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    claims = subject.capabilities
    repeats = None if claims.deterministic else "deterministic is not claimed"
    invariant = None if claims.batch_invariant else "batch_invariant is not claimed"
    bench = _Bench(subject)
    crowd = invariant or needs_requests(claims) or needs_block(claims)
    company: dict[str, tuple[Callable[[str], None], str | None]] = {
        "same-batch": (bench.repeated, repeats),
        "among-neighbours": (bench.among_neighbours, invariant),
        "in-small-chunks": (bench.in_small_chunks, invariant),
        "after-losing-its-blocks": (bench.after_losing_blocks, crowd),
    }
    found = []
    for place, dtype in enumerate(claims.dtypes):
        for name, (method, unclaimed) in company.items():
            run = partial(method, dtype)
            found.append(Check(level=LEVEL, name=f"{name}-{dtype}", run=run, unclaimed=unclaimed, quick=place == 0))
    found.append(Check(level=LEVEL, name="steps-started-ahead", run=bench.ahead, quick=True))
    return found


@dataclass(eq=False)
class RepeatedProgram:
    """Runs every batch twice and compares the bits.

    Attributes:
        program: the device's.
        problems: what differed, for each batch in which something did.
    """

    program: Program
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.placement = self.program.placement
        self.evaluate = self.program.evaluate
        self.memory_bytes = self.program.memory_bytes
        self.close = self.program.close

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Both runs, one after the other; the first one's result."""
        first = self.program.run(batch, cache).result()
        second = self.program.run(batch, cache).result()
        different = difference(first, second)
        if different is not None:
            self.problems.append(f"a batch of {len(batch.token_ids)} tokens gave other {different} when run again")
        return FinishedStep(step_result=first)


def difference(one: StepResult, other: StepResult) -> str | None:
    """The first part in which two results of the same rows differ by a bit, or None."""
    if not np.array_equal(one.token_ids, other.token_ids):
        return "tokens"
    if (one.logprobs is None) != (other.logprobs is None):
        return "logprobs"
    if one.logprobs is not None and other.logprobs is not None:
        for name in ("chosen", "ranks", "top_token_ids", "top"):
            mine, theirs = getattr(one.logprobs, name), getattr(other.logprobs, name)
            if np.ascontiguousarray(mine).tobytes() != np.ascontiguousarray(theirs).tobytes():
                return f"logprobs ({name})"
    return None


class _Bench:
    """The checks, and the programs that they share."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    @cached_property
    def _shelf(self) -> ProgramShelf:
        return ProgramShelf(self._subject.device())

    def repeated(self, dtype: str) -> None:
        """Every batch of a load, run twice."""
        for name in MODELS:
            model = tiny_model(name)
            settings = DriveSettings(dtype=dtype)
            program = RepeatedProgram(self._shelf.program(model, settings.bounds(self._shelf.device)))
            with engine_on(self._shelf.device, program, model, settings) as engine:
                found = engine.run(loads.arriving(self._load(model), 2))
            if program.problems:
                raise CheckFailed(f"{len(program.problems)} batches changed; {program.problems[0]}.")
            errors = [generated.error for generated in found if generated.error is not None]
            if errors:
                raise CheckFailed(f"A request failed: {errors[0]}")

    def among_neighbours(self, dtype: str) -> None:
        """All requests at once."""
        for name in MODELS:
            model = tiny_model(name)
            self._compare(model, self._load(model), DriveSettings(dtype=dtype))

    def in_small_chunks(self, dtype: str) -> None:
        """Prompts cut into several steps, in which others are too."""
        for name in MODELS:
            model = tiny_model(name)
            self._compare(model, self._load(model), DriveSettings(dtype=dtype, max_tokens=5, max_requests=3))

    def after_losing_blocks(self, dtype: str) -> None:
        """Requests that are computed again, in other steps than at first."""
        size = self._subject.capabilities.block_sizes[0]
        for name in MODELS:
            model = tiny_model(name)
            crowd, room = loads.crowding(model.graph.vocab_size, size)
            settings = DriveSettings(
                dtype=dtype, cache_tokens=room, max_context=room, max_tokens=max(3 * size, DriveSettings.max_tokens)
            )
            if not self._compare(model, self._varied(crowd), settings):
                raise CheckFailed("The load did not do what it is for: nobody lost blocks.")

    def _compare(self, model: TinyModel, requests: list[LoadRequest], settings: DriveSettings) -> int:
        """Hold each request's bits in company against those alone; how many were preempted."""
        plain = replace(settings, prefix_caching=False)
        with drive(self._shelf, model, plain) as engine:
            together = engine.run(requests)
            preemptions = engine.statistics().preemptions
        with drive(self._shelf, model, DriveSettings(dtype=settings.dtype, prefix_caching=False)) as engine:
            alone = [found for request in requests for found in engine.run([request])]
        for place, (one, other) in enumerate(zip(alone, together, strict=True)):
            _require_same(f"{model.name}, request {place}", one, other)
        return preemptions

    def ahead(self) -> None:
        """Each step of a load is started before the one before it is fetched."""
        model = tiny_model("windowed")
        batches: list[Batch] = []
        settings = DriveSettings(before=batches.append)
        with drive(self._shelf, model, settings) as engine:
            engine.run(loads.arriving(self._load(model), 2))
            blocks, bounds = engine.blocks, engine.bounds
        device = self._shelf.device
        program = self._shelf.program(model, bounds)
        layout = CacheLayout(groups=model.graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype)
        in_turn: list[StepResult] = []
        started_ahead: list[StepResult] = []
        for overlapping, results in ((False, in_turn), (True, started_ahead)):
            cache = device.allocate_cache(layout, blocks)
            waiting: list[StepOutput] = []
            for batch in batches:
                waiting.append(program.run(batch, cache))
                if len(waiting) > overlapping:
                    results.append(_fetched(waiting.pop(0)))
            results += [_fetched(output) for output in waiting]
            cache.close()
        for number, (one, other) in enumerate(zip(in_turn, started_ahead, strict=True)):
            if not self._agree(one, other):
                raise CheckFailed(
                    f"Step {number} of {len(batches)} gave another result when the next one was started before it was "
                    "fetched."
                )

    def _agree(self, one: StepResult, other: StepResult) -> bool:
        """Equal bits where the device promises them; else equal tokens wherever the choice was no close one."""
        if self._subject.capabilities.deterministic:
            return difference(one, other) is None
        if one.logprobs is None or one.logprobs.top.shape[1] < 2:
            return one.token_ids.shape == other.token_ids.shape
        clear = one.logprobs.top[:, 0] - one.logprobs.top[:, 1] > CLEAR_CHOICE
        return bool(np.array_equal(one.token_ids[clear], other.token_ids[clear]))

    def _load(self, model: TinyModel) -> list[LoadRequest]:
        context = DriveSettings().bounds(self._shelf.device).max_context
        return self._varied(loads.simple(model.graph.vocab_size, min(context, max(loads.LENGTHS) + loads.OUTPUTS)))

    def _varied(self, requests: Sequence[LoadRequest]) -> list[LoadRequest]:
        """Greedy and drawn requests, all with logprobs."""
        wanted = min(3, self._subject.capabilities.max_logprobs)
        return [
            replace(request, logprobs=wanted, temperature=0.9 * (place % 3 == 1), seed=500 + place)
            for place, request in enumerate(requests)
        ]


CLEAR_CHOICE = 0.5
"""Difference of two logprobs that no rounding turns round, for devices whose bits change from run to run."""


def _fetched(output: StepOutput) -> StepResult:
    result = output.result()
    if difference(result, output.result()) is not None:
        raise CheckFailed("A step's result was another one when it was fetched again.")
    return result


def _require_same(where: str, alone: Generated, found: Generated) -> None:
    if alone.error is not None or found.error is not None:
        raise CheckFailed(f"{where}: it failed: {alone.error or found.error}")
    if alone.tokens != found.tokens:
        raise CheckFailed(f"{where}: it generated {found.tokens}, and alone {alone.tokens}.")
    for offset, (mine, theirs) in enumerate(zip(alone.scores, found.scores, strict=True)):
        if mine != theirs:
            raise CheckFailed(
                f"{where}: token {offset} has the logprob {theirs.logprob!r}, and alone {mine.logprob!r}."
            )
