"""Words that must not be generated, as sequences of token ids.

Knows no tokenizer but the encode function that it is given, and no logits. A
sequence is kept from completion by forbidding its last token wherever the
tokens before it have just been written; a word that the model spells with other
tokens is not caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


def bad_word_ids(encode: Callable[[str], Sequence[int]], words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words, each at the beginning of a text and after a space.

    Args:
        encode: text to token ids, without special tokens.
        words: at least one character each.

    Returns:
        Different sequences, in the order of the words.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip(" ")):
            ids = tuple(encode(text))
            if ids:
                found[ids] = None
    return tuple(found)


class BadWordMatcher:
    """Follows one sequence and knows which tokens would complete a bad word now."""

    def __init__(self, words: Iterable[Sequence[int]], prompt_ids: Sequence[int]) -> None:
        self._words = tuple(tuple(word) for word in words)
        self._reach = max((len(word) for word in self._words), default=1) - 1
        self._tail = list(prompt_ids[-self._reach :]) if self._reach else []

    def last_tokens(self) -> frozenset[int]:
        """All tokens that may come to be forbidden."""
        return frozenset(word[-1] for word in self._words)

    def append(self, token_id: int) -> None:
        """Note the sequence's next token."""
        if self._reach:
            self._tail.append(token_id)
            del self._tail[: -self._reach]

    def forbidden(self) -> set[int]:
        """Tokens that would complete a bad word if they came next."""
        tail = tuple(self._tail)
        return {word[-1] for word in self._words if len(word) == 1 or tail[1 - len(word) :] == word[:-1]}
