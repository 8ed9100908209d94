"""The record of live requests, from which a fresh engine takes them up again.

Holds token ids and parameters: no text, no stream, no process. As a token depends
on its sequence's seed and position alone, a request that is sent again with what it
emitted goes on as if nothing had happened.

Invariant: what a journal holds as emitted is what the caller was given, no token
more and none less.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from midspan.engine.messages import AddRequest, SequenceStart


class JournalEntry:
    """One live request.

    Attributes:
        request: as it was first sent.
    """

    def __init__(self, request: AddRequest) -> None:
        self.request = request
        self._prompt_scored = False
        self._seeds = {start.index: start.seed for start in request.sequences}
        self._emitted: dict[int, list[int]] = {start.index: list(start.emitted_ids) for start in request.sequences}

    def emit(self, index: int, token_ids: Iterable[int], *, prompt_scored: bool = False) -> None:
        """Note tokens that the caller is given. What comes after a sequence's end is ignored.

        Args:
            index: the sequence.
            token_ids: its new tokens.
            prompt_scored: the prompt's logprobs were given with them.
        """
        self._prompt_scored = self._prompt_scored or prompt_scored
        if index in self._emitted:
            self._emitted[index].extend(token_ids)

    def end(self, index: int) -> None:
        """Note that a sequence ended."""
        self._emitted.pop(index, None)

    def emitted(self, index: int) -> list[int]:
        """A copy of what a live sequence emitted."""
        return list(self._emitted[index])

    def live(self) -> tuple[int, ...]:
        """Indexes of the sequences that did not end."""
        return tuple(self._emitted)

    def resumption(self) -> AddRequest:
        """The message that makes a fresh engine go on; prompt logprobs that were given are not asked for again."""
        params = self.request.params
        if self._prompt_scored and params.prompt_logprobs is not None:
            params = params.replace(prompt_logprobs=None)
        starts = [
            SequenceStart(index=index, seed=self._seeds[index], emitted_ids=list(ids))
            for index, ids in self._emitted.items()
        ]
        return msgspec.structs.replace(self.request, params=params, sequences=starts)


class Journal:
    """Live requests in the order of their arrival."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, request: AddRequest) -> JournalEntry:
        """Begin the record of a request."""
        entry = self._entries[request.request_id] = JournalEntry(request)
        return entry

    def close(self, request_id: str) -> None:
        """Forget a request that ended; unknown ones are ignored."""
        self._entries.pop(request_id, None)

    def resumptions(self) -> list[AddRequest]:
        """What a fresh engine shall go on with, in the order of arrival."""
        return [entry.resumption() for entry in self._entries.values()]
