"""The replies of ``/v1/completions``: whole, and as a stream of chunks.

One reply may hold several prompts with ``n`` completions each; the choice of
completion ``i`` of prompt ``p`` has the index ``p * n + i``. Knows the engine's
output records and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midspan.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from midspan_api.protocol.completion_request import CompletionRequest
from midspan_api.protocol.logprob_objects import CompletionLogprobs, prompt_logprobs
from midspan_api.protocol.reply_header import ReplyHeader, event
from midspan_api.protocol.text_chunks import TextChunks
from midspan_api.protocol.usage import Usage

KIND = "text_completion"


@dataclass(kw_only=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    places: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class _Prompt:
    token_ids: list[int] = field(default_factory=list)
    places: list[TokenLogprobs | None] | None = None


class CompletionReply:
    """Collects a whole reply.

    Args:
        request: what was asked.
        header: identity of the reply.
        prompt_texts: the prompts as ``echo`` shows them.
        token_text: token id -> its text alone.
    """

    def __init__(
        self,
        request: CompletionRequest,
        header: ReplyHeader,
        prompt_texts: Sequence[str],
        token_text: Callable[[int], str],
    ) -> None:
        self._request = request
        self._header = header
        self._prompt_texts = prompt_texts
        self._token_text = token_text
        self._n = request.n or 1
        self._choices = [_Choice() for _ in range(self._n * len(prompt_texts))]
        self._prompts: dict[int, _Prompt] = {}
        self._usage = Usage()

    def add(self, position: int, output: RequestOutput) -> None:
        """Take in an increment of the prompt at ``position``."""
        prompt = self._prompts.get(position)
        if prompt is None:
            prompt = self._prompts[position] = _Prompt(token_ids=output.prompt_token_ids)
            self._usage.start(output)
        if output.prompt_logprobs is not None:
            prompt.places = output.prompt_logprobs
        if not self._request.only_scores():
            self._usage.add(output)
        for piece in output.outputs:
            self._collect(self._choices[position * self._n + piece.index], piece)

    def _collect(self, choice: _Choice, piece: CompletionOutput) -> None:
        if not self._request.only_scores():
            choice.texts.append(piece.text)
            choice.token_ids.extend(piece.token_ids)
            choice.places.extend(piece.logprobs or ())
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

    def json_object(self) -> dict[str, Any]:
        """The reply."""
        result = self._header.json_object(KIND)
        result["choices"] = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        result["usage"] = self._usage.json_object()
        result["system_fingerprint"] = None
        return result

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        position = index // self._n
        prompt = self._prompts[position]
        result: dict[str, Any] = {
            "index": index,
            "text": (self._prompt_texts[position] if self._request.echo else "") + "".join(choice.texts),
            "logprobs": None,
            "finish_reason": "length" if self._request.only_scores() else choice.finish_reason,
            "stop_reason": None if self._request.only_scores() else choice.stop_reason,
        }
        if self._request.logprobs is not None:
            logprobs = CompletionLogprobs(top=self._request.logprobs)
            if self._request.echo and prompt.places is not None:
                logprobs.add_prompt(prompt.token_ids, prompt.places, self._token_text)
            logprobs.add(choice.token_ids, choice.places)
            result["logprobs"] = logprobs.take()
        if self._request.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(prompt.places)
        if self._request.return_token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = prompt.token_ids
        return result


class CompletionChunks:
    """Writes a reply as events."""

    def __init__(
        self,
        request: CompletionRequest,
        header: ReplyHeader,
        prompt_texts: Sequence[str],
        token_text: Callable[[int], str],
    ) -> None:
        self._request = request
        self._header = header
        self._prompt_texts = prompt_texts
        self._token_text = token_text
        self._n = request.n or 1
        self._continuous = request.wants_continuous_usage()
        self._detailed = request.logprobs is not None or bool(request.return_token_ids) or self._continuous
        self._text = TextChunks(header, KIND, delta=False, null_usage=request.wants_usage())
        self._usage = Usage()
        self._started: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def events(self, position: int, output: RequestOutput) -> bytes:
        """The events for an increment of the prompt at ``position``; may be empty."""
        opening = b"" if position in self._started else self._open(position, output)
        if not self._request.only_scores():
            self._usage.add(output)
        return opening + b"".join([self._piece(position, piece) for piece in output.outputs])

    def closing(self) -> bytes:
        """The events after the last increment, without the end of the stream."""
        if not self._request.wants_usage():
            return b""
        return event({**self._header.json_object(KIND), "choices": [], "usage": self._usage.json_object()})

    def _open(self, position: int, output: RequestOutput) -> bytes:
        self._started.add(position)
        self._usage.start(output)
        if not self._request.echo and not self._request.return_token_ids:
            return b""
        events = []
        for index in range(position * self._n, (position + 1) * self._n):
            choice = self._choice(index, self._prompt_texts[position] if self._request.echo else "")
            if self._request.echo and self._request.logprobs is not None and output.prompt_logprobs is not None:
                logprobs = self._logprobs_of(index)
                logprobs.add_prompt(output.prompt_token_ids, output.prompt_logprobs, self._token_text)
                choice["logprobs"] = logprobs.take()
            if self._request.return_token_ids:
                choice["prompt_token_ids"] = output.prompt_token_ids
                choice["token_ids"] = []
            events.append(event(self._chunk(choice)))
        return b"".join(events)

    def _piece(self, position: int, piece: CompletionOutput) -> bytes:
        index = position * self._n + piece.index
        if self._request.only_scores():
            if piece.finish_reason is None:
                return b""
            return event(self._chunk({**self._choice(index, ""), "finish_reason": "length"}))
        if piece.finish_reason is None and not self._detailed:
            return self._text.event(index, piece.text) if piece.text else b""
        choice = self._choice(index, piece.text)
        choice["finish_reason"] = piece.finish_reason
        if self._request.logprobs is not None and piece.logprobs:
            logprobs = self._logprobs_of(index)
            logprobs.add(piece.token_ids, piece.logprobs)
            choice["logprobs"] = logprobs.take()
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return event(self._chunk(choice))

    def _logprobs_of(self, index: int) -> CompletionLogprobs:
        return self._logprobs.setdefault(index, CompletionLogprobs(top=self._request.logprobs or 0))

    @staticmethod
    def _choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._header.json_object(KIND), "choices": [choice]}
        if self._continuous:
            chunk["usage"] = self._usage.json_object()
        elif self._request.wants_usage():
            chunk["usage"] = None
        return chunk
