"""The messages between the process that serves and the process that computes.

Typed records in msgpack (msgspec); nothing else crosses, and nothing is executed
by being read. Knows neither sockets nor the engine.

Invariant: every message of one direction is a member of that direction's union,
and decoding yields such a record or raises ``ProtocolError``.

Source of the encoding: the MessagePack specification.
"""

from __future__ import annotations

from typing import Union

import msgspec

from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.status import EngineStatistics, ModelInfo, StartupPhase
from midspan.errors import MidspanError
from midspan.settings import EngineSettings


class ProtocolError(MidspanError):
    """What came over the connection is no message of the agreed kind."""

    code = "protocol_error"


class SequenceStart(msgspec.Struct, frozen=True, array_like=True):
    """One of the n sequences of a request.

    Attributes:
        index: 0 to n - 1.
        seed: of its random numbers.
        emitted_ids: tokens that it generated before, when it is resumed.
    """

    index: int
    seed: int
    emitted_ids: list[int] = []


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """The first message: open the device.

    Attributes:
        settings: the engine's settings.
    """

    settings: EngineSettings


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """The second message: load the model.

    Attributes:
        path: the resolved model, a folder or a file.
    """

    path: str


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """Generate for a prompt.

    Attributes:
        request_id: unique among live requests.
        prompt_ids: token ids, at least one.
        params: what to generate; ``max_tokens`` is a number here.
        sequences: which of its n sequences to run; all of them, except on resumption.
        eos_token_ids: ids that end a text unless ``params.ignore_eos``.
        bad_word_ids: token sequences that must not appear.
        priority: lower runs earlier under the priority policy.
        cache_salt: only requests with the same salt share cached prefixes.
        arrival_time: seconds of the monotonic clock.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    sequences: list[SequenceStart]
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop a request, or one of its sequences.

    Attributes:
        request_id: which; unknown and finished ones are ignored.
        index: one sequence, or None for all of them.
        reason: the finish reason under which it is counted.
    """

    request_id: str
    index: int | None = None
    reason: str = "abort"


class CachePiece(msgspec.Struct, frozen=True, array_like=True):
    """Keys and values of some tokens of a sequence, in one cache group.

    Attributes:
        request_id: its request.
        index: its index there.
        group: name of the cache group.
        first: position of the first token.
        tokens: how many, at least 1.
        data: little-endian float32 ``[layers, 2, tokens, kv_heads, head_size]``, the canonical layout
            of ``interface.cache`` without the division into blocks.
    """

    request_id: str
    index: int
    group: str
    first: int
    tokens: int
    data: bytes


class MovedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sequence stands that leaves one engine for another.

    Attributes:
        index: 0 to n - 1.
        computed_tokens: tokens, from the first on, whose cache content is in the pieces; 0: none.
        shared_tokens: of those, tokens whose content is that of the request's first sequence with
            computed tokens, in groups that keep all tokens; its own pieces begin behind them.
        cached_tokens: see ``scheduling.Request``.
        scheduled_time: when it first entered a step, seconds of the monotonic clock.
        score_prompt: whether it scores its request's prompt.
        scored_tokens: rows of the prompt that were scored.
        prompt_scores: by position, those that were not reported yet.
        reported: whether its ``PromptReport`` was made.
    """

    index: int
    computed_tokens: int = 0
    shared_tokens: int = 0
    cached_tokens: int | None = None
    scheduled_time: float | None = None
    score_prompt: bool = False
    scored_tokens: int = 0
    prompt_scores: dict[int, TokenScores] = {}
    reported: bool = False


class MovedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A live request outside of any engine.

    Attributes:
        fingerprint: of the model, see ``engine.migration``.
        request: what makes an engine go on with it from its tokens alone.
        sequences: in the order of ``request.sequences``.
        pieces: the content of its cache blocks.
    """

    fingerprint: str
    request: AddRequest
    sequences: list[MovedSequence]
    pieces: list[CachePiece] = []


class Detach(msgspec.Struct, frozen=True, kw_only=True, tag="detach"):
    """Give a live request away; answered by its pieces, then ``Detached``."""

    request_id: str


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag="piece"):
    """A part of a request's cache on its way between processes; before ``Detached`` and before ``Attach``."""

    piece: CachePiece


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """Go on with a request whose pieces came before; answered by ``Attached``."""

    moved: MovedRequest


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """Ask for a sign of life between two steps."""

    number: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Release the device and end."""


class TokenScores(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs at one place.

    Attributes:
        token_id: the token that stands there.
        logprob: its natural logarithm of probability.
        rank: 1 for the most probable.
        top_ids: the most probable tokens.
        top: their logprobs.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top: list[float]


class PromptReport(msgspec.Struct, frozen=True, array_like=True):
    """What is known once a request's prompt was processed.

    Attributes:
        cached_tokens: prompt tokens taken from the prefix cache.
        scheduled_time: when it first entered a step, seconds of the monotonic clock.
        scores: for each prompt token after the first; None when not asked for.
    """

    cached_tokens: int
    scheduled_time: float
    scores: list[TokenScores] | None = None


class SequenceEvent(msgspec.Struct, frozen=True, array_like=True):
    """News of one sequence.

    Attributes:
        request_id: its request.
        index: its index there.
        token_ids: new tokens.
        scores: one for each new token, or None.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"error"`` or None.
        stop_reason: the stop token that ended it, None for end-of-sequence.
        error: why it failed.
        prompt: with the first news of a sequence.
    """

    request_id: str
    index: int
    token_ids: list[int] = []
    scores: list[TokenScores] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    prompt: PromptReport | None = None


class StepEvents(msgspec.Struct, frozen=True, kw_only=True, tag="events"):
    """What happened since the last report.

    Attributes:
        sequences: news, none for sequences without any.
        statistics: the engine's counters now.
    """

    sequences: list[SequenceEvent]
    statistics: EngineStatistics


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The engine takes requests now."""

    model: ModelInfo


class Problem(msgspec.Struct, frozen=True, kw_only=True, tag="problem"):
    """A message was refused; the engine goes on.

    Attributes:
        code: the error's code.
        message: what was wrong with it.
    """

    code: str
    message: str


class Fatal(msgspec.Struct, frozen=True, kw_only=True, tag="fatal"):
    """The last message of an engine that cannot go on.

    Attributes:
        code: the error's code, see ``midspan.errors``.
        message: what happened.
        remedy: what to do now.
        restartable: whether a fresh process may do better.
    """

    code: str
    message: str
    remedy: str = ""
    restartable: bool = False


class Detached(msgspec.Struct, frozen=True, kw_only=True, tag="detached"):
    """A request has left.

    Attributes:
        request_id: which.
        moved: without its pieces, which came before; None: there was no such live request.
    """

    request_id: str
    moved: MovedRequest | None = None


class Attached(msgspec.Struct, frozen=True, kw_only=True, tag="attached"):
    """A request has arrived, or was refused.

    Attributes:
        request_id: which.
        tokens: tokens whose cache content was taken over, over all sequences.
        problem: why it was refused; None: it goes on.
    """

    request_id: str
    tokens: int = 0
    problem: str | None = None


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """The answer to a ping, with its number."""

    number: int


ToEngine = Union[Start, Load, AddRequest, Abort, Detach, Piece, Attach, Ping, Shutdown]
FromEngine = Union[StartupPhase, Started, StepEvents, Piece, Detached, Attached, Problem, Fatal, Pong]


def encode(message: ToEngine | FromEngine) -> bytes:
    """A message as bytes."""
    return msgspec.msgpack.encode(message)


def decode_to_engine(payload: bytes) -> ToEngine:
    """A message to the engine from bytes.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        message: ToEngine = msgspec.msgpack.decode(payload, type=ToEngine)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"A message to the engine cannot be read: {error}") from error
    return message


def decode_from_engine(payload: bytes) -> FromEngine:
    """A message from the engine from bytes.

    Raises:
        ProtocolError: the bytes are no such message.
    """
    try:
        message: FromEngine = msgspec.msgpack.decode(payload, type=FromEngine)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"A message from the engine cannot be read: {error}") from error
    return message
