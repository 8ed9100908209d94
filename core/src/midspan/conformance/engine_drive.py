"""Requests through the real scheduler, runner and engine, on one device and a tiny model.

Knows what an engine is made of, and no checkpoint, no text and no socket. What is held against
what is the levels' business.

Invariants: programs and caches of a drive are closed with it, and the device never is; limits
that the device claims are kept; what a load was meant to make happen is counted, so that a check
can tell that it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from midspan.conformance.check import CheckFailed
from midspan.conformance.tiny_model import TinyModel
from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.loading import LoadedModel
from midspan.engine.messages import AddRequest, SequenceStart, TokenScores
from midspan.engine.request_seeds import sequence_seed
from midspan.engine.status import EngineStatistics, ModelInfo
from midspan.engine.step_loop import EngineCore
from midspan.interface import Batch, Bounds, Cache, CacheLayout, Device, Program, StepOutput
from midspan.settings import EngineSettings

MAX_TOKENS, MAX_REQUESTS, MAX_CONTEXT = 256, 8, 640
"""Of a drive's programs, where the device claims no less."""
MOST_STEPS = 5000
"""More than any load here takes."""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request of a load.

    Attributes:
        prompt: token ids.
        outputs: tokens to generate.
        temperature: 0 is greedy.
        seed: of its random numbers.
        n: sequences.
        logprobs, prompt_logprobs: as for ``SamplingParams``.
        enters: the step before which it comes in.
    """

    prompt: tuple[int, ...]
    outputs: int = 12
    temperature: float = 0.0
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    enters: int = 0

    def message(self, name: str) -> AddRequest:
        """What the engine is told."""
        return AddRequest(
            request_id=name,
            prompt_ids=list(self.prompt),
            params=SamplingParams(
                n=self.n,
                temperature=self.temperature,
                seed=self.seed,
                max_tokens=self.outputs,
                ignore_eos=True,
                logprobs=self.logprobs,
                prompt_logprobs=self.prompt_logprobs,
                detokenize=False,
            ),
            sequences=[SequenceStart(index=index, seed=sequence_seed(self.seed, index)) for index in range(self.n)],
        )


@dataclass(kw_only=True, eq=False)
class Generated:
    """One sequence of a request.

    Attributes:
        request: what was asked.
        index: 0 to n - 1.
        tokens: generated.
        scores: of the generated tokens.
        prompt_scores: of the prompt's tokens after the first.
        cached_tokens: tokens of the prompt that were found in blocks.
        error: why it failed.
    """

    request: LoadRequest
    index: int
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    prompt_scores: list[TokenScores] | None = None
    cached_tokens: int = 0
    error: str | None = None

    @property
    def seed(self) -> int:
        """Of this sequence's random numbers."""
        return sequence_seed(self.request.seed, self.index)

    def sequence(self) -> list[int]:
        """Prompt and output."""
        return [*self.request.prompt, *self.tokens]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one run of the program was.

    Attributes:
        tokens, requests, rows: T, B and S.
        decodes: requests of which one token was run, in a context of more.
        context: the longest.
    """

    tokens: int
    requests: int
    rows: int
    decodes: int
    context: int

    @property
    def mixed(self) -> bool:
        """Whether prefill and decode were in it together."""
        return 0 < self.decodes < self.requests


class WatchedProgram:
    """A program whose runs are noted, and may be made to go wrong by a function.

    Args:
        program: the device's.
        before: called with each batch before the device sees it; what it raises, ``run`` raises.
    """

    def __init__(self, program: Program, before: Callable[[Batch], None] | None = None) -> None:
        self.placement = program.placement
        self.evaluate = program.evaluate
        self.memory_bytes = program.memory_bytes
        self.close = program.close
        self.shapes: list[StepShape] = []
        self._run = program.run
        self._before = before

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Note the batch and hand it on."""
        if self._before is not None:
            self._before(batch)
        counts = np.diff(batch.query_starts)
        self.shapes.append(
            StepShape(
                tokens=len(batch.token_ids),
                requests=len(batch.context_lengths),
                rows=len(batch.rows_to_sample),
                decodes=int(np.count_nonzero((counts == 1) & (batch.context_lengths > 1))),
                context=int(batch.context_lengths.max(initial=0)),
            )
        )
        return self._run(batch, cache)


@dataclass(frozen=True, kw_only=True)
class DriveSettings:
    """How a drive's engine is set up.

    Attributes:
        dtype, cache_dtype: None: those that the device prefers.
        block_size: None: the one that the device prefers.
        max_tokens, max_requests, max_context: of the engine; the device's claims go before.
        cache_tokens: tokens that each group's blocks hold; None: enough for all requests.
        prefix_caching: reuse blocks of equal prefixes.
        before: see ``WatchedProgram``.
    """

    dtype: str | None = None
    cache_dtype: str | None = None
    block_size: int | None = None
    max_tokens: int = MAX_TOKENS
    max_requests: int = MAX_REQUESTS
    max_context: int = MAX_CONTEXT
    cache_tokens: int | None = None
    prefix_caching: bool = True
    before: Callable[[Batch], None] | None = None

    def bounds(self, device: Device) -> Bounds:
        """The limits, cut to what the device claims."""
        claims = device.capabilities
        tokens = _least(self.max_tokens, claims.max_tokens)
        dtype = self.dtype or claims.dtypes[0]
        same = dtype if dtype in claims.cache_dtypes else claims.cache_dtypes[0]
        return Bounds(
            max_tokens=tokens,
            max_requests=min(_least(self.max_requests, claims.max_requests), tokens),
            max_context=_least(self.max_context, claims.max_context),
            max_sampled_rows=_least(tokens, claims.max_sampled_rows),
            block_size=self.block_size or claims.block_sizes[0],
            dtype=dtype,
            cache_dtype=self.cache_dtype or same,
        )


def _least(wanted: int, claimed: int | None) -> int:
    return wanted if claimed is None else min(wanted, claimed)


class ProgramShelf:
    """Compiled programs of one device, each made when it is first asked for.

    Compiling may be slow where a device takes the graph whole, so drives whose limits are smaller
    than a program's use that program.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._programs: dict[tuple[str, str, str, int, int], Program] = {}

    def program(self, model: TinyModel, bounds: Bounds) -> Program:
        """A program that serves these bounds."""
        context = bounds.max_context
        widest = replace(DriveSettings(), max_context=max(MAX_CONTEXT, context)).bounds(self.device)
        key = (model.name, bounds.dtype, bounds.cache_dtype, bounds.block_size, widest.max_context)
        if key not in self._programs:
            largest = replace(
                bounds,
                max_tokens=max(widest.max_tokens, bounds.max_tokens),
                max_requests=max(widest.max_requests, bounds.max_requests),
                max_context=widest.max_context,
                max_sampled_rows=max(widest.max_sampled_rows, bounds.max_sampled_rows),
            )
            self._programs[key] = self.device.compile(model.graph, model.weights(), largest)
        return self._programs[key]


class EngineDrive:
    """An engine on a device, and what its program was asked to run.

    Attributes:
        core: the engine.
        bounds: its limits.
        program: notes each run.
        blocks: of each cache group.
    """

    def __init__(self, core: EngineCore, bounds: Bounds, program: WatchedProgram, blocks: tuple[int, ...]) -> None:
        self.core = core
        self.bounds = bounds
        self.program = program
        self.blocks = blocks

    def run(self, requests: Sequence[LoadRequest]) -> list[Generated]:
        """Run requests to their end.

        Returns:
            Their sequences, request by request.

        Raises:
            CheckFailed: the engine did not come to an end, or kept blocks.
        """
        found = {
            (str(place), index): Generated(request=request, index=index)
            for place, request in enumerate(requests)
            for index in range(request.n)
        }
        waiting = sorted(range(len(requests)), key=lambda place: requests[place].enters)
        for step in range(MOST_STEPS):
            while waiting and requests[waiting[0]].enters <= step:
                place = waiting.pop(0)
                self.core.add(requests[place].message(str(place)))
            if not self.core.has_work() and not waiting:
                break
            for event in self.core.step().sequences:
                into = found[(event.request_id, event.index)]
                into.tokens += event.token_ids
                into.scores += event.scores or []
                into.error = event.error or into.error
                if event.prompt is not None:
                    into.prompt_scores, into.cached_tokens = event.prompt.scores, event.prompt.cached_tokens
        self._check_end()
        return list(found.values())

    def statistics(self) -> EngineStatistics:
        """The engine's counters."""
        return self.core.statistics()

    def _check_end(self) -> None:
        left = self.core.statistics()
        if self.core.has_work():
            raise CheckFailed(f"The engine did not come to an end in {MOST_STEPS} steps.")
        if left.blocks_in_use or left.running or left.waiting:
            raise CheckFailed(f"The engine ended and kept {left.blocks_in_use} blocks of requests that are over.")
        self.core.scheduler.check_integrity()


@contextmanager
def drive(shelf: ProgramShelf, model: TinyModel, settings: DriveSettings | None = None) -> Iterator[EngineDrive]:
    """An engine with a cache of its own, closed at the end."""
    chosen = settings or DriveSettings()
    with engine_on(shelf.device, shelf.program(model, chosen.bounds(shelf.device)), model, chosen) as made:
        yield made


@contextmanager
def engine_on(device: Device, program: Program, model: TinyModel, settings: DriveSettings) -> Iterator[EngineDrive]:
    """An engine on a program that the caller compiled and closes; its cache is closed at the end."""
    bounds = settings.bounds(device)
    needed = bounds.max_requests * -(-bounds.max_context // bounds.block_size)
    if settings.cache_tokens is not None:
        needed = -(-settings.cache_tokens // bounds.block_size)
    blocks = (1 + needed,) * len(model.graph.cache)
    layout = CacheLayout(groups=model.graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype)
    cache = device.allocate_cache(layout, blocks)
    watched = WatchedProgram(program, settings.before)
    try:
        loaded = LoadedModel(
            info=_info(model, device, bounds, (blocks[0] - 1) * bounds.block_size),
            graph=model.graph,
            device=device,
            program=watched,
            cache=cache,
            bounds=bounds,
        )
        asked = EngineSettings(model=model.name, enable_prefix_caching=settings.prefix_caching)
        yield EngineDrive(EngineCore(loaded, asked), bounds, watched, blocks)
    finally:
        cache.close()


def _info(model: TinyModel, device: Device, bounds: Bounds, cache_tokens: int) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        path="",
        architecture=model.graph.architecture,
        max_model_len=min(bounds.max_context, cache_tokens),
        vocab_size=model.graph.vocab_size,
        dtype=bounds.dtype,
        cache_dtype=bounds.cache_dtype,
        device=device.info.id,
        device_description=device.info.description,
        device_choice="",
        weights_bytes=0,
        cache_bytes=0,
        cache_tokens=cache_tokens,
        block_size=bounds.block_size,
        max_num_seqs=bounds.max_requests,
        max_logprobs=device.capabilities.max_logprobs,
        created=0,
    )
