"""A live request leaves one engine and goes on in another: other device, other block size, other cache type.

What moves is the request as a fresh engine would be asked to resume it (tokens,
parameters, seeds), where each of its sequences stands, and the content of its cache in the
canonical layout. As a token depends on its sequence's seed and position and on the
logits alone, nothing else is needed. Knows no process and no client.

Invariants: a request that was packed and refused goes on unchanged where it was; blocks that hold
moved content are private to the request, because what another device computed
differs in the last bits, and requests of the target must not come to depend on it; a
sequence that finds no room waits and is computed again from its tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Ordered
from dataclasses import asdict, dataclass
from hashlib import sha256

import msgspec

from midspan.engine.cache_pieces import fault, read_tokens, write_tokens
from midspan.engine.loading import LoadedModel
from midspan.engine.messages import AddRequest, CachePiece, MovedRequest, MovedSequence, ProtocolError, SequenceStart
from midspan.engine.sequence import Sequence, make_sequence
from midspan.errors import ContextLengthExceeded, DeviceLost, MidspanError
from midspan.interface.cache import Cache, CacheGroup
from midspan.interface.graph import Graph
from midspan.scheduling.request import Request
from midspan.scheduling.scheduler import Scheduler

logger = logging.getLogger("midspan.engine")


class MoveRefused(MidspanError):
    """This engine cannot go on with that request."""

    code = "move_refused"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """A sequence that is about to enter an engine.

    Attributes:
        sequence: made anew from its tokens.
        moved: where it stood.
    """

    sequence: Sequence
    moved: MovedSequence


def model_fingerprint(graph: Graph) -> str:
    """What two engines must have in common: architecture, vocabulary, width, positions and cache groups.

    Weights are not looked at: that both engines loaded the same ones is up to who moves requests.
    """
    facts = (
        graph.architecture,
        graph.vocab_size,
        graph.hidden_size,
        graph.max_position,
        [sorted(asdict(group).items()) for group in graph.cache],
    )
    return sha256(repr(facts).encode()).hexdigest()


def encode_moved(moved: MovedRequest) -> bytes:
    """A moved request as MessagePack, to be kept or sent."""
    return msgspec.msgpack.encode(moved)


def decode_moved(payload: bytes) -> MovedRequest:
    """What ``encode_moved`` wrote; whether it fits an engine is checked by ``arrivals``.

    Raises:
        ProtocolError: the bytes are no such record.
    """
    try:
        return msgspec.msgpack.decode(payload, type=MovedRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"A moved request cannot be read: {error}") from error


def pack(sequences: Ordered[Sequence], loaded: LoadedModel) -> MovedRequest:
    """Describe all live sequences of one request; nothing is changed.

    Args:
        sequences: by rising index, between two steps.
        loaded: the engine's model, with the cache that holds their blocks. Where it cannot be read, the
            request moves without content, to be computed again.

    Raises:
        DeviceLost: the cache is gone with its device.
    """
    groups, cache = loaded.graph.cache, loaded.cache
    base = next((sequence.scheduled for sequence in sequences if sequence.scheduled.computed_tokens), None)
    states: list[MovedSequence] = []
    pieces: list[CachePiece] = []
    try:
        for sequence in sequences:
            scheduled = sequence.scheduled
            shared = 0 if base is None or scheduled is base else _shared_tokens(groups, base, scheduled, cache)
            states.append(_state(sequence, shared))
            if scheduled.computed_tokens:
                pieces += _read(cache, groups, sequence, shared)
    except DeviceLost:
        raise
    except Exception:
        logger.exception("the cache of request %s cannot be read; it moves without", sequences[0].request_id)
        bare = [_state(sequence, 0) for sequence in sequences]
        states, pieces = [msgspec.structs.replace(state, computed_tokens=0) for state in bare], []
    return MovedRequest(
        fingerprint=model_fingerprint(loaded.graph),
        request=_resumption(sequences),
        sequences=states,
        pieces=pieces,
    )


def arrivals(moved: MovedRequest, loaded: LoadedModel) -> list[Arrival]:
    """Check a moved request and make its sequences.

    Args:
        moved: from another engine, perhaps through another process.
        loaded: the model that shall go on with it.

    Raises:
        MoveRefused: it is of another model, or its parts do not fit each other.
        ContextLengthExceeded: it may become longer than this engine serves.
        InvalidRequest: the scheduler or the sampler refuses it.
    """
    _check_model(moved, loaded)
    _check_parts(moved, loaded.graph)
    made = []
    for start, state in zip(moved.request.sequences, moved.sequences, strict=True):
        sequence = make_sequence(
            moved.request,
            start,
            leader=moved.request.sequences[0],
            vocab_size=loaded.graph.vocab_size,
            max_model_len=loaded.info.max_model_len,
        )
        sequence.scheduled_time = state.scheduled_time
        sequence.reported = state.reported
        sequence.prompt_scores = dict(state.prompt_scores)
        scheduled = sequence.scheduled
        scheduled.score_prompt = state.score_prompt
        scheduled.scored_tokens = state.scored_tokens
        scheduled.cached_tokens = 0 if state.computed_tokens and state.cached_tokens is None else state.cached_tokens
        made.append(Arrival(sequence=sequence, moved=state))
    return made


def settle(arriving: Ordered[Arrival], pieces: Ordered[CachePiece], scheduler: Scheduler, loaded: LoadedModel) -> int:
    """Put sequences into a scheduler and their cache content into blocks.

    Args:
        arriving: from ``arrivals``.
        pieces: their cache content.
        scheduler: between two steps.
        loaded: its model.

    Returns:
        Tokens whose content was taken over; the others are computed again.

    Raises:
        MidspanError: the scheduler or the cache refused one; then none of them is there.
    """
    cache, groups = loaded.cache, loaded.graph.cache
    first = next((arrival.moved for arrival in arriving if arrival.moved.computed_tokens), None)
    base: Request | None = None
    taken, settled = 0, []
    try:
        for arrival in arriving:
            scheduled, moved = arrival.sequence.scheduled, arrival.moved
            settled.append(scheduled.request_id)
            if not moved.computed_tokens:
                scheduler.add(scheduled)
                continue
            shared = moved.shared_tokens
            if not scheduler.adopt(scheduled, moved.computed_tokens, base=base, shared_tokens=shared):
                continue
            shared_here = 0 if base is None else shared // cache.layout.block_size * cache.layout.block_size
            for number, group in enumerate(groups):
                known = _content(pieces, group, first, moved)
                begin = shared_here if group.window is None else _first_seen(group, moved.computed_tokens)
                table = scheduled.tables[number].blocks
                write_tokens(cache, group, table, known, first=begin, end=moved.computed_tokens)
            taken += moved.computed_tokens
            base = scheduled if moved is first else base
    except Exception:
        for request_id in settled:
            scheduler.finish(request_id, "moved")
        raise
    return taken


def _resumption(sequences: Ordered[Sequence]) -> AddRequest:
    leading = sequences[0]
    return msgspec.structs.replace(
        leading.request,
        prompt_ids=leading.scheduled.prompt_ids,
        # The limit that this engine set, so that no other one ends it earlier or later.
        params=leading.request.params.replace(max_tokens=leading.rule.max_tokens),
        sequences=[
            SequenceStart(index=sequence.index, seed=sequence.seed, emitted_ids=sequence.scheduled.output_ids)
            for sequence in sequences
        ],
    )


def _state(sequence: Sequence, shared: int) -> MovedSequence:
    scheduled = sequence.scheduled
    return MovedSequence(
        index=sequence.index,
        computed_tokens=scheduled.computed_tokens,
        shared_tokens=shared,
        cached_tokens=scheduled.cached_tokens,
        scheduled_time=sequence.scheduled_time,
        score_prompt=scheduled.score_prompt,
        scored_tokens=scheduled.scored_tokens,
        prompt_scores=dict(sequence.prompt_scores),
        reported=sequence.reported,
    )


def _read(cache: Cache, groups: Ordered[CacheGroup], sequence: Sequence, shared: int) -> list[CachePiece]:
    scheduled = sequence.scheduled
    end = scheduled.computed_tokens
    pieces: list[CachePiece] = []
    for group, table in zip(groups, scheduled.tables, strict=True):
        first = shared if group.window is None else _first_seen(group, end)
        pieces += read_tokens(
            cache, group, table.blocks, request_id=sequence.request_id, index=sequence.index, first=first, end=end
        )
    return pieces


def _shared_tokens(groups: Ordered[CacheGroup], base: Request, request: Request, cache: Cache) -> int:
    """Tokens in blocks that two requests have in common, in every group that keeps all tokens."""
    most = min(base.computed_tokens, request.computed_tokens) // cache.layout.block_size
    found = False
    for number, group in enumerate(groups):
        if group.window is not None or not most:
            continue
        found = True
        pairs = zip(base.tables[number].blocks[:most], request.tables[number].blocks[:most], strict=True)
        most = next((place for place, (one, other) in enumerate(pairs) if one != other), most)
    return most * cache.layout.block_size if found else 0


def _first_seen(group: CacheGroup, position: int) -> int:
    """Position of the first token that the token at ``position`` sees."""
    return 0 if group.window is None else max(0, position - group.window + 1)


def _content(
    pieces: Ordered[CachePiece], group: CacheGroup, first: MovedSequence | None, moved: MovedSequence
) -> list[CachePiece]:
    """Pieces of one sequence in one group; before them those of the first sequence, where it shares them."""
    own = [piece for piece in pieces if piece.group == group.name and piece.index == moved.index]
    if group.window is not None or first is None or not moved.shared_tokens:
        return own
    return [piece for piece in pieces if piece.group == group.name and piece.index == first.index] + own


def _check_model(moved: MovedRequest, loaded: LoadedModel) -> None:
    request = moved.request
    if moved.fingerprint != model_fingerprint(loaded.graph):
        raise MoveRefused(
            f"Request {request.request_id!r} is of another model than {loaded.info.name}.",
            remedy="Move it to an engine of the same model.",
        )
    limit, most = loaded.info.max_model_len, len(request.prompt_ids) + (request.params.max_tokens or 0)
    if most > limit or request.params.max_tokens is None:
        raise ContextLengthExceeded(
            f"Request {request.request_id!r} may reach {most} tokens; the limit here is {limit}.",
            remedy="Move it to an engine with the same max_model_len.",
        )
    wanted = max(request.params.logprobs or 0, request.params.prompt_logprobs or 0)
    if wanted > loaded.info.max_logprobs:
        raise MoveRefused(
            f"Request {request.request_id!r} wants {wanted} logprobs; this device gives {loaded.info.max_logprobs}.",
            remedy="Move it to a device that gives as many.",
        )


def _check_parts(moved: MovedRequest, graph: Graph) -> None:
    """Hold a record that may have come over a wire against itself and the model."""
    request = moved.request
    wrong = None
    if not moved.sequences or [start.index for start in request.sequences] != [one.index for one in moved.sequences]:
        wrong = "its sequences are not those of its states"
    elif len({one.index for one in moved.sequences}) != len(moved.sequences):
        wrong = "a sequence comes twice"
    first = next((place for place, one in enumerate(moved.sequences) if one.computed_tokens), None)
    for start, state in zip(request.sequences, moved.sequences, strict=False):
        wrong = wrong or _sequence_fault(moved, start, state, first, graph)
    if wrong is not None:
        raise MoveRefused(
            f"The moved request {request.request_id!r} cannot be right: {wrong}.", remedy="Resume it from its tokens."
        )


def _sequence_fault(
    moved: MovedRequest, start: SequenceStart, state: MovedSequence, first: int | None, graph: Graph
) -> str | None:
    request = moved.request
    tokens = [*request.prompt_ids, *start.emitted_ids]
    if any(not 0 <= token < graph.vocab_size for token in tokens):
        return "a token is not in the vocabulary"
    if not 0 <= state.computed_tokens < len(tokens) or not 0 <= state.scored_tokens <= len(request.prompt_ids):
        return f"{state.computed_tokens} computed and {state.scored_tokens} scored of {len(tokens)} tokens"
    # Computed rows are never scored again, so theirs must be there whatever the count of scored ones says.
    scored = range(1, min(max(state.scored_tokens, state.computed_tokens) + 1, len(request.prompt_ids)))
    if state.score_prompt and not state.reported and not set(scored) <= set(state.prompt_scores):
        return "scores of its prompt are missing"
    if first is None or not state.computed_tokens:
        return None
    base = moved.sequences[first]
    shared, leading = state.shared_tokens, request.sequences[first]
    same = [*request.prompt_ids, *leading.emitted_ids][: max(shared, 0)] == tokens[: max(shared, 0)]
    most = 0 if base is state else min(base.computed_tokens, state.computed_tokens)
    if not 0 <= shared <= most or not same:
        return f"{shared} tokens cannot be shared with its first sequence"
    for group in graph.cache:
        begin = 0 if group.window is None else _first_seen(group, state.computed_tokens)
        found = fault(_content(moved.pieces, group, base, state), group, begin, state.computed_tokens)
        if found is not None:
            return found
    return None
