"""What may not enter a scheduler, and what may not be found in one.

Knows nothing of steps or budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from midspan.errors import CacheTooSmall, ContextLengthExceeded, InvalidRequest
from midspan.scheduling.request import Request, RequestStatus


def refuse_impossible(request: Request, max_model_len: int, longest: int | None) -> None:
    """Refuse a request that could never run.

    Args:
        request: not added yet.
        max_model_len: tokens of one request at most.
        longest: tokens that the whole cache holds of one request; None: any number. The last
            token of a request is never run, so it needs no room.

    Raises:
        InvalidRequest: it was added to a scheduler before.
        ContextLengthExceeded: it may become longer than the model allows.
        CacheTooSmall: it could not run even alone.
    """
    name = request.request_id
    if request.rank or request.status is not RequestStatus.WAITING:
        raise InvalidRequest(f"Request {name!r} was added before.", remedy="Make a new one for each addition.")
    if request.max_total_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"Request {name!r} may reach {request.max_total_tokens} tokens; the limit is {max_model_len}.",
            remedy="Shorten the prompt or ask for fewer tokens.",
        )
    if longest is not None and request.max_total_tokens - 1 > longest:
        raise CacheTooSmall(
            f"Request {name!r} may reach {request.max_total_tokens} tokens; the whole cache holds {longest}.",
            remedy=f"Ask for at most {longest + 1} tokens with the prompt, or give the cache more memory.",
        )


def refuse_foreign_fork(request: Request, leader: Request) -> None:
    """Refuse a fork that does not repeat its leader's prompt.

    Raises:
        InvalidRequest: prompt or salt differ.
    """
    length = request.prompt_length
    same_tokens = length == leader.prompt_length and request.token_ids[:length] == leader.token_ids[:length]
    if not same_tokens or request.salt != leader.salt:
        raise InvalidRequest(
            f"Request {request.request_id!r} has another prompt or salt than {leader.request_id!r}.",
            remedy="A fork repeats its leader's prompt and salt.",
            parameter="fork_of",
        )


def queue_faults(requests: Iterable[Request], running: Sequence[Request], waiting: Sequence[Request]) -> list[str]:
    """Broken invariants between the queues, in words.

    Args:
        requests: all that live.
        running: those of them that run.
        waiting: those that wait.
    """
    wrong = []
    known = {id(request) for request in requests}
    if {id(request) for request in (*running, *waiting)} != known:
        wrong.append("a live request is neither running nor waiting, or an ended one still is")
    if len(running) + len(waiting) != len(known):
        wrong.append("a request is queued twice")
    wrong += [f"{request!r} waits and owns blocks" for request in waiting if request.tables]
    return wrong
