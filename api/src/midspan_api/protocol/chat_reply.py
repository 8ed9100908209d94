"""The replies of ``/v1/chat/completions``: whole, and as a stream of chunks.

Knows the engine's output records and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from midspan.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from midspan_api.protocol.chat_request import ChatRequest
from midspan_api.protocol.logprob_objects import TokenBytes, chat_logprobs, prompt_logprobs
from midspan_api.protocol.reply_header import ReplyHeader, event
from midspan_api.protocol.text_chunks import TextChunks
from midspan_api.protocol.usage import Usage

CHUNK = "chat.completion.chunk"


@dataclass(kw_only=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatReply:
    """Collects a whole reply."""

    def __init__(self, request: ChatRequest, header: ReplyHeader, token_bytes: TokenBytes) -> None:
        self._request = request
        self._header = header
        self._token_bytes = token_bytes
        self._choices = {index: _Choice() for index in range(request.n or 1)}
        self._usage = Usage()
        self._prompt_token_ids: list[int] | None = None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in an increment."""
        if self._prompt_token_ids is None:
            self._prompt_token_ids = output.prompt_token_ids
            self._usage.start(output)
        self._usage.add(output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        for piece in output.outputs:
            choice = self._choices[piece.index]
            choice.texts.append(piece.text)
            choice.token_ids.extend(piece.token_ids)
            choice.logprobs.extend(piece.logprobs or ())
            if piece.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

    def json_object(self) -> dict[str, Any]:
        """The reply."""
        result = self._header.json_object("chat.completion")
        result["choices"] = [self._choice(index, choice) for index, choice in self._choices.items()]
        result["usage"] = self._usage.json_object()
        result["system_fingerprint"] = None
        if self._request.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs)
        if self._request.return_token_ids:
            result["prompt_token_ids"] = self._prompt_token_ids
        return result

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs:
            top = self._request.top_logprobs or 0
            logprobs = chat_logprobs(choice.logprobs, choice.token_ids, top, self._token_bytes)
        result = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            result["token_ids"] = choice.token_ids
        return result


class ChatChunks:
    """Writes a reply as events: first the role of each choice, then its text, at last the usage."""

    def __init__(self, request: ChatRequest, header: ReplyHeader, token_bytes: TokenBytes) -> None:
        self._request = request
        self._header = header
        self._token_bytes = token_bytes
        self._continuous = request.wants_continuous_usage()
        self._detailed = bool(request.logprobs or request.return_token_ids or self._continuous)
        self._text = TextChunks(header, CHUNK, delta=True, null_usage=request.wants_usage())
        self._usage = Usage()
        self._started = False

    def events(self, output: RequestOutput) -> bytes:
        """The events for an increment, one after the other; may be empty."""
        opening = b"".join(self._open(output)) if not self._started else b""
        self._usage.add(output)
        return opening + b"".join([self._piece(piece) for piece in output.outputs])

    def closing(self) -> bytes:
        """The events after the last increment, without the end of the stream."""
        if not self._request.wants_usage():
            return b""
        last = self._header.json_object(CHUNK)
        return event({**last, "choices": [], "usage": self._usage.json_object()})

    def _open(self, output: RequestOutput) -> Iterator[bytes]:
        self._started = True
        self._usage.start(output)
        for index in range(self._request.n or 1):
            chunk = self._chunk(
                {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            )
            if self._request.return_token_ids:
                chunk["prompt_token_ids"] = output.prompt_token_ids
            yield event(chunk)

    def _piece(self, piece: CompletionOutput) -> bytes:
        if piece.finish_reason is None and not self._detailed:
            return self._text.event(piece.index, piece.text) if piece.text else b""
        logprobs = None
        if self._request.logprobs and piece.logprobs:
            top = self._request.top_logprobs or 0
            logprobs = chat_logprobs(piece.logprobs, piece.token_ids, top, self._token_bytes)
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text or piece.finish_reason is None else {},
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return event(self._chunk(choice))

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._header.json_object(CHUNK), "choices": [choice]}
        if self._continuous:
            chunk["usage"] = self._usage.json_object()
        elif self._request.wants_usage():
            chunk["usage"] = None
        return chunk
