"""Writes the events of a stream at the least cost for each token.

A chunk that carries only text is three pieces of bytes: what stands before the
text, the text as a JSON string, and what stands after it. The outer two are
made once for a stream.
"""

from __future__ import annotations

import msgspec

from midspan_api.protocol.reply_header import ReplyHeader


class TextChunks:
    """Events of one stream that carry nothing but text.

    Args:
        header: identity of the reply.
        kind: the ``object`` of each chunk.
        delta: whether the text stands in a ``delta`` (chat) or in the choice itself.
        null_usage: whether each chunk says ``"usage":null``, as OpenAI does when a usage chunk will follow.
    """

    def __init__(self, header: ReplyHeader, kind: str, *, delta: bool, null_usage: bool) -> None:
        self._opening = b"data: " + header.opening(kind) + b',"choices":[{"index":'
        self._text_field = b',"delta":{"content":' if delta else b',"text":'
        self._after = (
            (b"}" if delta else b"")
            + b',"logprobs":null,"finish_reason":null}]'
            + (b',"usage":null' if null_usage else b"")
            + b"}\n\n"
        )
        self._before: dict[int, bytes] = {}

    def event(self, index: int, text: str) -> bytes:
        """The event that adds ``text`` to choice ``index``."""
        before = self._before.get(index)
        if before is None:
            before = self._opening + str(index).encode() + self._text_field
            self._before[index] = before
        return before + msgspec.json.encode(text) + self._after
