"""Tokenizers out of a GGUF file's metadata alone.

Source: the GGUF specification's section on tokenizers,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Vocabularies of kind
``gpt2`` (byte-level merges) and ``llama`` (SentencePiece's merges by score) are
read. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.gguf_file import read_gguf
from midspan.text import sentencepiece_model as spm
from midspan.text.byte_pair_encoding import byte_level_bpe, merges_from_scores, sentencepiece_bpe
from midspan.text.tokenizer_source import TokenizerSource, add_whole_tokens, surround_texts
from midspan.text.word_splits import WORD_SPLITS, WordSplit

_OTHER_TOKENIZER = "Name a folder that has the model's tokenizer.json with --tokenizer."
_ENDS = ("eos", "eot", "eom")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer_gguf(path: Path) -> TokenizerSource:
    """Read a tokenizer from a GGUF file.

    Raises:
        UnsupportedModel: a kind of vocabulary or of word cut that is not known here.
        CheckpointError: the file or its vocabulary is damaged.
    """
    return tokenizer_from_metadata(read_gguf(path).metadata, origin=str(path))


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, origin: str) -> TokenizerSource:
    """The same, from metadata that was read already.

    Args:
        metadata: key -> value of a GGUF file.
        origin: its name, for messages.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise UnsupportedModel(f"{origin} has no tokenizer.", remedy=_OTHER_TOKENIZER)
    vocabulary = _Vocabulary(metadata, origin)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        split = _split(metadata, origin)
        backend, begins = _byte_level(vocabulary, split), split.begins_text
    elif kind == "llama":
        backend, begins = _sentencepiece(vocabulary), True
    else:
        raise UnsupportedModel(
            f"{origin} has a vocabulary of kind {kind!r}; known are 'gpt2' and 'llama'.", remedy=_OTHER_TOKENIZER
        )
    add_whole_tokens(backend, vocabulary.of_type(spm.CONTROL, spm.UNKNOWN), vocabulary.of_type(spm.USER_DEFINED))
    special = {role: text for role, key in _ROLES.items() if (text := vocabulary.named(key)) is not None}
    before = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", begins) else None
    after = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    surround_texts(backend, before, after)
    ends = (vocabulary.named_id(key) for key in _ENDS)
    return TokenizerSource(
        origin=origin,
        backend=backend,
        bos_token_id=vocabulary.named_id("bos"),
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        special_tokens=special,
        chat_templates=_chat_templates(metadata),
    )


class _Vocabulary:
    """Tokens with their types, and the ids that the metadata names."""

    def __init__(self, metadata: Mapping[str, Any], origin: str) -> None:
        self._metadata = metadata
        self._origin = origin
        self.tokens: tuple[str, ...] = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type")
        self.types = [spm.NORMAL] * len(self.tokens) if types is None else types.tolist()
        if len(self.types) != len(self.tokens):
            raise self.damaged(f"{len(self.tokens)} tokens but {len(self.types)} token types")
        self.ids = {token: index for index, token in enumerate(self.tokens)}

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"The vocabulary of {self._origin} is damaged: {what}.", remedy="Download it again.")

    def of_type(self, *kinds: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds and token]

    def array(self, key: str) -> Any:
        if key not in self._metadata:
            raise self.damaged(f"it has no {key}")
        return self._metadata[key]

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(key, default))

    def named_id(self, name: str) -> int | None:
        """The id under ``tokenizer.ggml.NAME_token_id``, if it is in the vocabulary."""
        token_id = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return token_id if isinstance(token_id, int) and 0 <= token_id < len(self.tokens) else None

    def named(self, name: str) -> str | None:
        token_id = self.named_id(name)
        return None if token_id is None else self.tokens[token_id]


def _split(metadata: Mapping[str, Any], origin: str) -> WordSplit:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in WORD_SPLITS:
        raise UnsupportedModel(
            f"{origin} cuts words in the way {name!r}, which is not known; known are {', '.join(WORD_SPLITS)}.",
            remedy=_OTHER_TOKENIZER,
        )
    return WORD_SPLITS[name]


def _byte_level(vocabulary: _Vocabulary, split: WordSplit) -> tokenizers.Tokenizer:
    halves = [merge.split(" ", 1) for merge in vocabulary.array("tokenizer.ggml.merges")]
    if any(len(half) != 2 for half in halves):
        raise vocabulary.damaged("a merge is no pair")
    try:
        return byte_level_bpe(vocabulary.ids, list(map(tuple, halves)), split)
    except Exception as error:  # the library raises bare Exception for a merge of unknown tokens
        raise vocabulary.damaged(str(error)) from error


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    mergeable = [kind in (spm.NORMAL, spm.USER_DEFINED) for kind in vocabulary.types]
    scores = vocabulary.array("tokenizer.ggml.scores").tolist()
    if len(scores) != len(mergeable):
        raise vocabulary.damaged(f"{len(mergeable)} tokens but {len(scores)} scores")
    try:
        return sentencepiece_bpe(
            vocabulary.ids,
            merges_from_scores(vocabulary.tokens, scores, mergeable),
            unknown=vocabulary.named("unknown"),
            space_before_text=vocabulary.flag("tokenizer.ggml.add_space_prefix", True),
        )
    except Exception as error:  # as above
        raise vocabulary.damaged(str(error)) from error


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
    for key in metadata:
        if key.startswith(_TEMPLATE + "."):
            found[key.removeprefix(_TEMPLATE + ".")] = metadata[key]
    return {name: text for name, text in found.items() if isinstance(text, str)}
