"""Tokenizers from GGUF metadata, against the tokenizers that the metadata was taken from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.text.byte_pair_encoding import merges_from_scores
from midspan.text.tokenizer import Tokenizer, load_tokenizer
from midspan.text.tokenizer_gguf import tokenizer_from_metadata

TEXTS = ["the quick fox", " leading", "  two", "a<|user|>b", "Grüße 😀 你好\n\n12", "", "over the lazy dog\n"]


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizer_from_metadata(metadata, origin="model.gguf"))


def vocabulary_of(backend: tokenizers.Tokenizer) -> list[str]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return sorted(vocabulary, key=lambda token: vocabulary[token])


@pytest.fixture
def byte_level_metadata(published: Any) -> dict[str, Any]:
    backend = published["byte_level"]
    tokens = vocabulary_of(backend)
    special = ("<unk>", "<s>", "</s>", "<|user|>")
    kinds = [3 if token in special else 4 if token in ("<think>", "«é»") else 1 for token in tokens]
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": tuple(" ".join(pair) for pair in merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
    }


@pytest.fixture
def sentencepiece_metadata(published: Any) -> dict[str, Any]:
    backend = published["sentencepiece"]
    tokens = vocabulary_of(backend)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|user|>": 3}
    types = [kinds.get(token, 6 if len(token) == 6 and token.startswith("<0x") else 1) for token in tokens]
    merges = ["".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    ranks = {piece: rank for rank, piece in reversed(list(enumerate(merges)))}
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_level_vocabulary_gives_the_ids_it_was_made_for(
    byte_level_metadata: dict[str, Any], byte_level: Tokenizer, text: str
) -> None:
    tokenizer = from_metadata(byte_level_metadata)
    assert tokenizer.encode(text) == byte_level.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_vocabulary_with_scores_gives_the_ids_it_was_made_for(
    sentencepiece_metadata: dict[str, Any], sentencepiece: Tokenizer, text: str
) -> None:
    tokenizer = from_metadata(sentencepiece_metadata)
    assert tokenizer.encode(text, add_special_tokens=False) == sentencepiece.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == sentencepiece.decode(sentencepiece.encode(text))


def test_roles_types_and_template_come_from_the_metadata(
    byte_level_metadata: dict[str, Any], sentencepiece_metadata: dict[str, Any]
) -> None:
    first = from_metadata(byte_level_metadata)
    assert first.bos_token_id == 1
    assert first.eos_token_ids == (2, 3)
    assert first.special_token_ids == {0, 1, 2, 3}
    assert first.chat_template is None
    second = from_metadata(sentencepiece_metadata)
    assert second.apply_chat_template([{"role": "user", "content": "x"}]) == "<s>x"


def test_a_vocabulary_with_scores_begins_texts_unless_the_file_denies_it(
    sentencepiece_metadata: dict[str, Any],
) -> None:
    assert from_metadata(sentencepiece_metadata).encode("fox")[0] == 1
    denied = {**sentencepiece_metadata, "tokenizer.ggml.add_bos_token": False}
    assert from_metadata(denied).encode("fox")[0] != 1
    ended = {**sentencepiece_metadata, "tokenizer.ggml.add_eos_token": True}
    assert from_metadata(ended).encode("fox")[-1] == 2


def test_a_byte_level_vocabulary_begins_no_text_unless_its_family_does(byte_level_metadata: dict[str, Any]) -> None:
    assert from_metadata(byte_level_metadata).encode("fox")[0] != 1
    llama3 = {**byte_level_metadata, "tokenizer.ggml.pre": "llama-bpe"}
    assert from_metadata(llama3).encode("fox")[0] == 1
    asked = {**byte_level_metadata, "tokenizer.ggml.add_bos_token": True}
    assert from_metadata(asked).encode("fox")[0] == 1


def test_without_a_space_before_texts_none_is_put_and_none_is_taken(sentencepiece_metadata: dict[str, Any]) -> None:
    tokenizer = from_metadata({**sentencepiece_metadata, "tokenizer.ggml.add_space_prefix": False})
    for text in ("fox", " fox"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_text(tokenizer.encode("fox", add_special_tokens=False)[0])[0] == "f"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModel, "'bert'"),
        ({"tokenizer.ggml.pre": "from-the-future"}, UnsupportedModel, "from-the-future"),
        ({"tokenizer.ggml.token_type": np.zeros(3, np.int32)}, CheckpointError, "3 token types"),
        ({"tokenizer.ggml.merges": ("nothing here",)}, CheckpointError, "damaged"),
        ({"tokenizer.ggml.merges": ("lonely",)}, CheckpointError, "no pair"),
        ({"tokenizer.ggml.model": "llama"}, CheckpointError, "scores"),
    ],
)
def test_what_cannot_be_read_is_said(
    byte_level_metadata: dict[str, Any], changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        from_metadata({**byte_level_metadata, **changes})


def test_a_file_without_a_tokenizer_is_said_with_a_remedy() -> None:
    with pytest.raises(UnsupportedModel, match="--tokenizer"):
        from_metadata({})


def test_ids_beyond_the_vocabulary_name_nothing(byte_level_metadata: dict[str, Any]) -> None:
    tokenizer = from_metadata({**byte_level_metadata, "tokenizer.ggml.eos_token_id": 10**6})
    assert tokenizer.eos_token_ids == (3,)


def test_a_written_file_is_read(tmp_path: Path, byte_level_metadata: dict[str, Any], byte_level: Tokenizer) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(byte_level_metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(byte_level_metadata["tokenizer.ggml.pre"])
    writer.add_token_list(list(byte_level_metadata["tokenizer.ggml.tokens"]))
    writer.add_token_types(byte_level_metadata["tokenizer.ggml.token_type"].tolist())
    writer.add_token_merges(list(byte_level_metadata["tokenizer.ggml.merges"]))
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("the quick fox") == byte_level.encode("the quick fox")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_merges_follow_scores_and_leave_out_what_cannot_be_merged() -> None:
    pieces = ["a", "b", "ab", "aba", "<s>", "<", "s>"]
    scores = [0.0, 0.0, -1.0, -0.5, 9.0, 0.0, 0.0]
    mergeable = [piece != "<s>" for piece in pieces]
    assert merges_from_scores(pieces, scores, mergeable) == [("ab", "a"), ("a", "b")]
