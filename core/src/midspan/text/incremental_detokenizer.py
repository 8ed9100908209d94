"""Token ids to text while they arrive, each character as soon as it is certain.

Linear in the number of tokens: nothing is decoded twice. Knows one sequence, no
request. Token ids that end a sequence are the scheduler's affair; only stop
strings are looked for here.

Invariants: the pieces and ``finish`` add up to ``Tokenizer.decode`` of the tokens
(up to a stop string); no piece ends within a character, and U+FFFD appears only
for bytes that can no longer become one; no piece holds the beginning of what may
yet turn out to be a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from midspan.text.stop_strings import StopStringMatcher
from midspan.text.token_bytes import BytesRule
from midspan.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one token added.

    Attributes:
        text: characters that became certain.
        stop: the stop string that ended the text, or None.
    """

    text: str
    stop: str | None = None


class IncrementalDetokenizer:
    """Follows one sequence.

    Args:
        tokenizer: the model's.
        stop: strings that end the text.
        include_stop: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        min_tokens: a stop string that is complete within so many tokens is none.
        continues_text: the text goes on from a prompt, see ``Tokenizer.decode``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        continues_text: bool = False,
    ) -> None:
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        rule = tokenizer.bytes_rule
        self._text: _TextStream = _WindowText(tokenizer) if rule is None else _ByteText(tokenizer, rule, continues_text)
        self._matcher = StopStringMatcher(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._stop: str | None = None

    def push(self, token_id: int) -> Piece:
        """Take the next token. After a stop string every piece is empty."""
        if self._stop is not None:
            return Piece(text="", stop=self._stop)
        self._tokens += 1
        text = "" if token_id in self._skipped else self._text.push(token_id)
        certain, self._stop = self._matcher.push(text, counts=self._tokens > self._min_tokens)
        return Piece(text=certain, stop=self._stop)

    def finish(self) -> str:
        """All that was held back: no token will come any more. After a stop string it is nothing."""
        if self._stop is not None:
            return ""
        certain, _ = self._matcher.push(self._text.finish(), counts=False)
        return certain + self._matcher.finish()


class _TextStream(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteText:
    """For tokens that have bytes of their own: an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, rule: BytesRule, continues_text: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = rule.strip
        self._strips_left = 0 if continues_text else rule.strip_count

    def push(self, token_id: int) -> str:
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strips_left and text:
            if not text.startswith(self._strip):
                self._strips_left = 0
                break
            text = text[len(self._strip) :]
            self._strips_left -= 1
        return text


class _WindowText:
    """For other decoders: the text that a token adds to the few tokens before it.

    The window begins where text was last handed out, one hand-out earlier for context,
    so the work for a token does not grow with the sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        added = self._added()
        if not added or added.endswith(_REPLACEMENT):
            return ""
        del self._window[: self._given]
        self._given = len(self._window)
        return added

    def finish(self) -> str:
        added = self._added()
        self._window, self._given = [], 0
        return added

    def _added(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given], skip_special_tokens=False)
        return self._tokenizer.decode(self._window, skip_special_tokens=False)[len(before) :]
