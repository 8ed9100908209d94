"""Log probabilities in the shapes of completions and of chat.

The engine gives, for each place, the token that stands there first and then the
top candidates. Chat wants the top ones in a list of their own, with bytes;
completions want parallel lists, with the offset of each token in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midspan.engine.outputs import Logprob, TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""

TokenBytes = Callable[[int], bytes]


def chat_logprobs(
    places: Sequence[TokenLogprobs], token_ids: Sequence[int], top: int, token_bytes: TokenBytes
) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice for the given tokens."""
    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        entry = _chat_entry(token_id, place[token_id], token_bytes)
        entry["top_logprobs"] = [_chat_entry(key, value, token_bytes) for key, value in top_candidates(place, top)]
        content.append(entry)
    return {"content": content, "refusal": None}


def top_candidates(place: TokenLogprobs, top: int) -> list[tuple[int, Logprob]]:
    """The ``top`` most probable candidates of a place, by falling probability."""
    ranked = [item for item in place.items() if item[1].rank is None or item[1].rank <= top]
    ranked.sort(key=lambda item: -item[1].logprob)
    return ranked[:top]


def _chat_entry(token_id: int, value: Logprob, token_bytes: TokenBytes) -> dict[str, Any]:
    return {
        "token": value.decoded_token,
        "logprob": max(value.logprob, LOWEST),
        "bytes": list(token_bytes(token_id)),
    }


@dataclass(kw_only=True)
class CompletionLogprobs:
    """The ``logprobs`` object of a completion choice, as it grows.

    Attributes:
        top: candidates to list with each token.
        offset: characters of the text before the next token.
    """

    top: int
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], places: Sequence[TokenLogprobs]) -> None:
        """Append generated tokens."""
        for token_id, place in zip(token_ids, places, strict=True):
            self._append(place[token_id], place)

    def add_prompt(
        self, token_ids: Sequence[int], places: Sequence[TokenLogprobs | None], token_text: Callable[[int], str]
    ) -> None:
        """Append the prompt's tokens; the first has no log probability, as nothing precedes it."""
        for token_id, place in zip(token_ids, places, strict=True):
            if place is None:
                self._write(token_text(token_id), None, None)
            else:
                self._append(place[token_id], place)

    def take(self) -> dict[str, Any]:
        """What was appended since the last call; offsets go on."""
        result = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return result

    def _append(self, chosen: Logprob, place: TokenLogprobs) -> None:
        top = {value.decoded_token: max(value.logprob, LOWEST) for _, value in top_candidates(place, self.top)}
        top.setdefault(chosen.decoded_token, max(chosen.logprob, LOWEST))
        self._write(chosen.decoded_token, max(chosen.logprob, LOWEST), top)

    def _write(self, text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(text)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(self.offset)
        self.offset += len(text)


def prompt_logprobs(places: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """Log probabilities of a prompt in vLLM's shape: candidates by token id, null for the first token."""
    if places is None:
        return None
    return [
        None if place is None else {str(key): _candidate(value) for key, value in place.items()} for place in places
    ]


def _candidate(value: Logprob) -> dict[str, Any]:
    return {"logprob": max(value.logprob, LOWEST), "rank": value.rank, "decoded_token": value.decoded_token}
