"""What a tokenizer is made of, whichever files it came from.

The readers of folders and of GGUF metadata end here, and ``Tokenizer`` begins
here. Knows no file format and no request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken, processors


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerSource:
    """A tokenizer's parts.

    Attributes:
        origin: the folder or file, for messages.
        backend: text to ids.
        bos_token_id: beginning-of-text token, or None.
        eos_token_ids: tokens that end a text, the tokenizer's own first.
        special_tokens: role in a chat template -> text: ``"eos_token"`` -> ``"</s>"``.
        chat_templates: name -> Jinja source; the usual one is ``"default"``.
    """

    origin: str
    backend: tokenizers.Tokenizer
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)


def add_whole_tokens(backend: tokenizers.Tokenizer, special: Sequence[str], plain: Sequence[str]) -> None:
    """Have tokens found whole in any text, before words are cut.

    Args:
        backend: changed in place.
        special: tokens that ``skip_special_tokens`` leaves out.
        plain: tokens that are ordinary text.
    """
    if special:
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if plain:
        backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])


def surround_texts(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Put tokens before and after a text that is encoded with special tokens.

    Args:
        backend: changed in place.
        before: a token of the vocabulary, or None.
        after: likewise.
    """
    pieces = [before or "", "$A", after or ""]
    used = {text: backend.token_to_id(text) for text in (before, after) if text}
    backend.post_processor = processors.TemplateProcessing(
        single=[piece for piece in pieces if piece], special_tokens=list(used.items())
    )
