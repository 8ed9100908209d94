"""The engine on tiny models: the real scheduler, runner and step loop, and the tokens of the definitions.

Each check runs a load that brings a situation about, makes sure that it came about, and holds
every token against the reference, see ``reference_judge``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

from midspan.conformance import loads
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.engine_drive import (
    MAX_REQUESTS,
    DriveSettings,
    EngineDrive,
    LoadRequest,
    ProgramShelf,
    drive,
    engine_on,
)
from midspan.conformance.reference_judge import ReferenceJudge
from midspan.conformance.step_results import InspectedProgram
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import CONFIGS, TinyModel, tiny_model
from midspan.interface import Capabilities

LEVEL = "engine"
SMALL_STEP = 7
"""Tokens of a step, where prompts are to take several."""
SHOWN = 8
"""Problems of results that a message lists."""
LEAST_CONTEXT = 4
"""In which a request still runs while the one after it begins."""
LIMIT_REQUESTS, LIMIT_TOKENS, LIMIT_CONTEXT = 48, 512, 512
"""A claimed limit is filled up to here."""


def checks(subject: Subject) -> Sequence[Check]:
    """The checks of this level."""
    claims = subject.capabilities
    bench = EngineBench(subject)
    found: list[Check] = []
    for name in CONFIGS:
        model = _named(name)
        for dtype in claims.dtypes:
            add = partial(_check, found, f"{name}-in-{dtype}")
            add("one-request", partial(bench.one_request, model, dtype))
            together = needs_requests(claims) or _needs_steps(claims)
            add("prefill-and-decode-together", partial(bench.mixed, model, dtype), together, quick=True)
        add = partial(_check, found, name)
        add("prompts-in-chunks", partial(bench.chunked, model), _needs_steps(claims), quick=True)
        add("shared-prefix", partial(bench.prefix, model), needs_block(claims), quick=True)
        add("preemption", partial(bench.preempted, model), needs_requests(claims) or needs_block(claims), quick=True)
    plain = _named("plain")
    _check(found, "", "several-sequences-drawn-with-seeds", partial(bench.drawn, plain), quick=True)
    _check(found, "", "logprobs", partial(bench.logprobs, plain), quick=True)
    for size in claims.block_sizes:
        _check(found, "", f"blocks-of-{size}", partial(bench.block_size, size))
    for dtype in claims.cache_dtypes:
        _check(found, "", f"cache-of-{dtype}", partial(bench.cache_dtype, dtype))
    _check(found, "", "results-as-declared", bench.results, quick=True)
    _check(found, "", "steps-as-large-as-claimed", bench.limits, _needs_limits(claims))
    return found


def _check(
    found: list[Check],
    model: str,
    name: str,
    run: Callable[[], None],
    unclaimed: str | None = None,
    *,
    quick: bool = False,
) -> None:
    whole = f"{name}-{model}" if model else name
    found.append(Check(level=LEVEL, name=whole, run=run, unclaimed=unclaimed, quick=quick))


def needs_requests(claims: Capabilities) -> str | None:
    """Why no two requests can be in one step, or None."""
    return "max_requests is 1" if claims.max_requests == 1 else None


def needs_block(claims: Capabilities) -> str | None:
    """Why no request can fill a block and go on, or None."""
    if claims.max_context is not None and claims.max_context < claims.block_sizes[0] + 10:
        return f"max_context is {claims.max_context}, which is hardly a block"
    return None


def _needs_steps(claims: Capabilities) -> str | None:
    """Why no request can go on for several steps, or None."""
    if claims.max_context is not None and claims.max_context < LEAST_CONTEXT:
        return f"max_context is {claims.max_context}, in which no request takes several steps"
    return None


def _needs_limits(claims: Capabilities) -> str | None:
    limits = (claims.max_tokens, claims.max_requests, claims.max_context, claims.max_sampled_rows)
    return "no limit of a step is claimed" if limits == (None,) * len(limits) else None


def _named(name: str) -> Callable[[], TinyModel]:
    """A model that is made when a check first needs it."""
    return partial(tiny_model, name)


class EngineBench:
    """The checks, and the programs that they share on the subject's device."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    @cached_property
    def shelf(self) -> ProgramShelf:
        """Programs of the shared device, closed with it."""
        return ProgramShelf(self._subject.device())

    def one_request(self, make: Callable[[], TinyModel], dtype: str) -> None:
        """A request alone: a prompt in one step, then a token a step."""
        self._run(make(), DriveSettings(dtype=dtype), lambda drive, vocab: _alone(drive, vocab))

    def mixed(self, make: Callable[[], TinyModel], dtype: str) -> None:
        """Requests that come in one after the other, so that prompts and single tokens meet in one step."""
        drive = self._run(
            make(),
            DriveSettings(dtype=dtype),
            lambda drive, vocab: loads.arriving(loads.simple(vocab, drive.bounds.max_context), 2),
        )
        _require(any(shape.mixed for shape in drive.program.shapes), "no step held prefill and decode together")

    def chunked(self, make: Callable[[], TinyModel]) -> None:
        """Prompts longer than a step."""
        small = min(SMALL_STEP, (self._subject.capabilities.max_context or 4 * SMALL_STEP) // 4)
        drive = self._run(
            make(),
            DriveSettings(max_tokens=small, max_requests=3),
            lambda drive, vocab: loads.long_prompts(vocab, drive.bounds.max_context, 6 * SMALL_STEP),
        )
        _require(max(shape.tokens for shape in drive.program.shapes) <= small, "a step was larger than its limit")
        _require(any(shape.rows < shape.requests for shape in drive.program.shapes), "no prompt was cut")

    def prefix(self, make: Callable[[], TinyModel]) -> None:
        """Requests that begin alike take blocks from those before them."""
        size = self._subject.capabilities.block_sizes[0]
        settings = DriveSettings(max_context=size + 16, max_tokens=max(size + 16, 64))
        drive = self._run(make(), settings, lambda drive, vocab: loads.shared_prefix(vocab, size))
        _require(drive.statistics().prefix_hits >= size, "no block of the prefix was found again")

    def preempted(self, make: Callable[[], TinyModel]) -> None:
        """A cache that is too small for all: one loses its blocks and is computed again."""
        model = make()
        size = self._subject.capabilities.block_sizes[0]
        load, room = loads.crowding(model.graph.vocab_size, size)
        settings = DriveSettings(max_context=room, cache_tokens=room, max_tokens=max(3 * size, 64))
        drive = self._run(model, settings, lambda drive, vocab: load)
        _require(drive.statistics().preemptions > 0, "nobody lost blocks")

    def drawn(self, make: Callable[[], TinyModel]) -> None:
        """Several sequences of one request, drawn with their seeds, in every type."""
        wanted = min(3, self._subject.capabilities.max_logprobs)
        for dtype in self._subject.dtypes():
            self._run(
                make(),
                DriveSettings(dtype=dtype),
                lambda drive, vocab: loads.sampled(vocab, drive.bounds.max_context, wanted),
            )

    def logprobs(self, make: Callable[[], TinyModel]) -> None:
        """Logprobs of generated tokens and of prompts, as many as are claimed, in every type."""
        wanted = min(self._subject.capabilities.max_logprobs, 20)
        for dtype in self._subject.dtypes():
            self._run(
                make(),
                DriveSettings(dtype=dtype),
                lambda drive, vocab: loads.scored(vocab, drive.bounds.max_context, wanted),
            )

    def results(self) -> None:
        """Every field of every step's result is of the declared type and shape, with logprobs and without."""
        model, settings, device = tiny_model("plain"), DriveSettings(), self.shelf.device
        program = InspectedProgram(
            program=self.shelf.program(model, settings.bounds(device)), claims=self._subject.capabilities
        )
        wanted = min(3, self._subject.capabilities.max_logprobs)
        with engine_on(device, program, model, settings) as engine:
            vocab, context = model.graph.vocab_size, engine.bounds.max_context
            engine.run(loads.simple(vocab, context, count=3))
            engine.run(loads.scored(vocab, context, wanted))
        if program.problems:
            raise CheckFailed("\n".join(list(program.problems)[:SHOWN]))

    def block_size(self, size: int) -> None:
        """A load in blocks of a claimed size."""
        self._run(
            tiny_model("windowed"),
            DriveSettings(block_size=size),
            lambda drive, vocab: loads.arriving(loads.simple(vocab, drive.bounds.max_context, count=4), 1),
        )

    def cache_dtype(self, dtype: str) -> None:
        """A load with a cache of a claimed type, beside activations of the preferred one."""
        self._run(
            tiny_model("plain"),
            DriveSettings(cache_dtype=dtype),
            lambda drive, vocab: loads.arriving(loads.simple(vocab, drive.bounds.max_context, count=4), 1),
        )

    def limits(self) -> None:
        """Steps that reach the claimed limits, and never go beyond them."""
        claims = self._subject.capabilities
        settings = DriveSettings(
            max_tokens=min(claims.max_tokens or LIMIT_TOKENS, LIMIT_TOKENS),
            max_requests=min(claims.max_requests or MAX_REQUESTS, LIMIT_REQUESTS),
            max_context=min(claims.max_context or LIMIT_CONTEXT, LIMIT_CONTEXT),
        )
        drive = self._run(tiny_model("plain"), settings, _filling)
        bounds = drive.bounds

        def shapes_of(field: str) -> int:
            return max(int(getattr(shape, field)) for shape in drive.program.shapes)

        # The last token of a request is never computed with, so a context is one short of its limit; and a step
        # that samples more rows than one run may is run in parts.
        longest = bounds.max_context - 1
        rows = bounds.max_sampled_rows
        reached = {
            "tokens": (shapes_of("tokens"), min(bounds.max_tokens, bounds.max_requests * longest), bounds.max_tokens),
            "requests": (shapes_of("requests"), min(bounds.max_requests, rows), bounds.max_requests),
            "tokens of one request": (shapes_of("context"), longest, bounds.max_context),
            "sampled rows": (shapes_of("rows"), min(bounds.max_requests, rows), rows),
        }
        for name, (most, least, limit) in reached.items():
            _require(
                least <= most <= limit, f"the largest step had {most} {name}, which is not from {least} to {limit}"
            )

    def _run(
        self, model: TinyModel, settings: DriveSettings, load: Callable[[EngineDrive, int], Sequence[LoadRequest]]
    ) -> EngineDrive:
        """Run a load and judge all of it."""
        with drive(self.shelf, model, settings) as engine:
            found = engine.run(load(engine, model.graph.vocab_size))
            ReferenceJudge(model).judge(found, engine.bounds.dtype, engine.bounds.cache_dtype)
            return engine


def _alone(drive: EngineDrive, vocab_size: int) -> list[LoadRequest]:
    length = max(1, min(21, drive.bounds.max_context - 30))
    return [LoadRequest(prompt=loads.tokens(length, 0, vocab_size), outputs=min(30, drive.bounds.max_context - length))]


def _filling(drive: EngineDrive, vocab_size: int) -> list[LoadRequest]:
    """One request as long as the context, and as many short ones as a step takes, all at once."""
    bounds = drive.bounds
    length = max(1, bounds.max_context - 1)
    longest = LoadRequest(prompt=loads.tokens(length, 90, vocab_size), outputs=1)
    short = max(1, min(2, bounds.max_context - 1))
    many = [
        LoadRequest(prompt=loads.tokens(short, 91 + place, vocab_size), outputs=min(8, bounds.max_context - short))
        for place in range(bounds.max_requests)
    ]
    enough = -(-bounds.max_tokens // length)
    wide = [
        LoadRequest(prompt=loads.tokens(length, 900 + place, vocab_size), outputs=1)
        for place in range(min(enough, bounds.max_requests))
    ]
    return [longest, *wide, *many]


def _require(holds: bool, otherwise: str) -> None:
    """What a load was meant to bring about, or what a limit promises."""
    if not holds:
        raise CheckFailed(f"The load did not do what it is for: {otherwise}.")
