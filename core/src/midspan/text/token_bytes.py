"""The bytes that each token stands for, whatever the tokens around it.

Most language models' decoders are of a kind in which a token's bytes do not
depend on its neighbours: byte-level ones, and SentencePiece's with byte
fallback. For these, decoding is joining bytes, which can be done token by token.
Other decoders are recognized as other (``BytesRule`` None) and nothing is assumed.

Knows no text to encode and no special token. Two decoders of the ``tokenizers``
library are followed to the letter except for one thing: a run of byte tokens
that is no valid UTF-8 is read as far as it is valid, not given up as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass(frozen=True, kw_only=True)
class BytesRule:
    """How tokens are spelled.

    Attributes:
        byte_letters: each letter of a token is one byte (unless it has a letter that is not).
        byte_tokens: ``<0x0A>`` is one byte.
        replacements: texts within a token and what they stand for, in order.
        strip: characters taken off the beginning of a whole text, at most ``strip_count`` times.
        strip_count: see there.
    """

    byte_letters: bool = False
    byte_tokens: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: str = ""
    strip_count: int = 0

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token, without regard to where it stands."""
        if self.byte_letters:
            if all(letter in _BYTE_OF_LETTER for letter in token):
                return bytes([_BYTE_OF_LETTER[letter] for letter in token])
            return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.match(token) if self.byte_tokens else None
        return token.encode() if match is None else bytes([int(match[1], 16)])


def bytes_rule(decoder: decoders.Decoder | None) -> BytesRule | None:
    """The rule of a decoder, or None when its tokens have no bytes of their own."""
    if decoder is None:
        return None
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return BytesRule(byte_letters=True)
    replacements: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        steps = steps[1:]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteFallback"], ["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    strip: dict[str, Any] = steps[2] if len(steps) == 3 else {"content": "", "start": 0, "stop": 0}
    if strip["stop"]:
        return None
    return BytesRule(
        byte_tokens=True, replacements=tuple(replacements), strip=strip["content"], strip_count=strip["start"]
    )


def _letters_of_bytes() -> Mapping[str, int]:
    """GPT-2's spelling: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()
