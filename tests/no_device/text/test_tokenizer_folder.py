"""Tokenizers from folders: which files count, and what is said when they do not do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from midspan.errors import CheckpointError, InvalidRequest, ModelNotFound, UnsupportedModel
from midspan.text.tokenizer import Tokenizer, load_tokenizer
from midspan.text.word_splits import WORD_SPLITS

MakeFolder = Callable[..., Path]


def config(**changes: object) -> dict[str, object]:
    return {"bos_token": "<s>", "eos_token": "</s>", **changes}


def test_ids_are_those_of_the_published_tokenizer(byte_level: Tokenizer, published: Any) -> None:
    for text in ("", "the quick fox", "a<|user|>b <think>", "Grüße 😀\n\n12"):
        assert byte_level.encode(text) == published["byte_level"].encode(text).ids


def test_special_tokens_are_found_by_their_role(byte_level: Tokenizer) -> None:
    assert byte_level.bos_token_id == 1
    assert byte_level.eos_token_ids == (2,)
    assert byte_level.special_token_ids == {0, 1, 2, 3}
    assert byte_level.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_the_vocabulary_counts_added_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.token_text(byte_level.vocab_size - 2) == "<think>"
    assert byte_level.token_bytes(byte_level.vocab_size) == b""


def test_a_token_has_bytes_and_text_of_its_own(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.token_text(byte_level.encode(" the")[0]) == " the"
    assert sentencepiece.token_text(sentencepiece.encode("the")[0]).startswith(" ")
    assert sentencepiece.token_bytes(3 + 0xE2) == b"\xe2"
    assert sentencepiece.token_text(3 + 0xE2) == "\ufffd"


def test_a_plain_added_token_is_text_and_a_special_one_is_not(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<think>b<|user|>c")
    assert byte_level.decode(ids) == "a<think>bc"
    assert byte_level.decode(ids, skip_special_tokens=False) == "a<think>b<|user|>c"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True, "bos_token": None}, []),
    ],
)
def test_the_tokens_around_a_text_are_those_of_the_configuration(
    make_folder: MakeFolder, flags: dict[str, object], expected: list[int]
) -> None:
    tokenizer = load_tokenizer(make_folder("byte_level", {"tokenizer_config.json": config(**flags)}))
    plain = tokenizer.encode("fox", add_special_tokens=False)
    ids = tokenizer.encode("fox")
    assert [token_id for token_id in ids if token_id in (1, 2)] == expected
    assert [token_id for token_id in ids if token_id not in (1, 2)] == plain


def test_what_tokenizer_json_puts_around_a_text_stands(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", {"tokenizer_config.json": config(add_bos_token=False, add_eos_token=True)})
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    ids = load_tokenizer(folder).encode("fox")
    assert ids[0] == 1
    assert 2 not in ids


def test_truncation_and_padding_of_the_publisher_are_not_applied(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(folder).encode("a b c d e f g h")) > 4


def test_end_tokens_come_from_the_generation_configuration_too(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", {"generation_config.json": {"eos_token_id": [3, 2]}})
    assert load_tokenizer(folder).eos_token_ids == (2, 3)


def test_without_any_other_the_end_token_is_the_model_configurations(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", {"tokenizer_config.json": {}, "config.json": {"eos_token_id": 3}})
    assert load_tokenizer(folder).eos_token_ids == (3,)


def test_roles_may_stand_in_the_special_tokens_map(make_folder: MakeFolder) -> None:
    files = {"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": {"content": "<|user|>"}}}
    assert load_tokenizer(make_folder("byte_level", files)).eos_token_ids == (3,)


def test_a_template_file_goes_before_the_configuration(make_folder: MakeFolder) -> None:
    files = {
        "tokenizer_config.json": config(chat_template="in configuration"),
        "chat_template.jinja": "in file",
        "additional_chat_templates/tool_use.jinja": "with tools",
    }
    tokenizer = load_tokenizer(make_folder("byte_level", files))
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.chat_template == "in file"
    assert tokenizer.apply_chat_template(messages) == "in file"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "with tools"


def test_templates_may_be_a_list_with_names(make_folder: MakeFolder) -> None:
    listed = [{"name": "default", "template": "usual"}, {"name": "rag", "template": "other"}]
    tokenizer = load_tokenizer(make_folder("byte_level", {"tokenizer_config.json": config(chat_template=listed)}))
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "usual"
    assert tokenizer.apply_chat_template(messages, template="rag") == "other"
    assert tokenizer.apply_chat_template(messages, template="own") == "own"


def without_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Take ``tokenizer.json`` out of a folder; returns its model part."""
    model: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    return model


def test_a_vocabulary_with_merges_makes_the_same_tokenizer(make_folder: MakeFolder, byte_level: Tokenizer) -> None:
    added = {
        str(byte_level.vocab_size - 2): {"content": "<think>", "special": False},
        str(byte_level.vocab_size - 1): {"content": "«é»", "special": False},
        **{str(token_id): {"content": byte_level.token_text(token_id), "special": True} for token_id in range(4)},
    }
    folder = make_folder("byte_level", {"tokenizer_config.json": config(added_tokens_decoder=added)})
    model = without_tokenizer_json(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_token_ids == byte_level.special_token_ids
    for text in ("the quick fox", "a<|user|>b <think>", "Grüße 😀\n\n12"):
        assert tokenizer.encode(text) == byte_level.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_an_added_token_with_an_impossible_id_is_an_error(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level", {"added_tokens.json": {"<new>": 10_000}})
    model = without_tokenizer_json(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="<new>"):
        load_tokenizer(folder)


def test_a_file_of_the_folder_names_the_folder(make_folder: MakeFolder) -> None:
    folder = make_folder("byte_level")
    assert load_tokenizer(folder / "tokenizer.json").vocab_size == load_tokenizer(folder).vocab_size


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")


def test_a_folder_without_a_tokenizer_is_said_with_a_remedy(make_folder: MakeFolder) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load_tokenizer(make_folder("none"))
    assert "tokenizer.json" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"a": '),
        ("generation_config.json", "\ufeff"),
    ],
)
def test_a_damaged_file_is_named(make_folder: MakeFolder, name: str, content: str) -> None:
    folder = make_folder("byte_level", {name: content})
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(folder)


def test_a_text_with_lone_surrogates_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        byte_level.encode("a\ud800b")


@pytest.mark.parametrize("name", sorted(WORD_SPLITS))
def test_every_known_cut_keeps_all_of_a_text(name: str) -> None:
    split = WORD_SPLITS[name]
    text = "Hello don't I'M 12345 3.14 \t x\n\n\r\n y  ünïcödé 你好ひらカナ नमस्ते <tag>[A]b_c  "
    spans = [span for _, span in split.pre_tokenizer().pre_tokenize_str(text)]
    assert "".join(text[start:end] for start, end in spans) == text


def cut_words(name: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in WORD_SPLITS[name].pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["I", "'m", " 12345", " ", " a", "\n", "\n", "1"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " ", " a", "\n\n", "1"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " ", " a", "\n\n", "1"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " ", " a", "\n\n", "1"]),
        ("deepseek-v3", ["I", "'m", " ", "123", "45", " ", " a", "\n\n", "1"]),
    ],
)
def test_digits_and_line_breaks_are_cut_in_each_familys_way(name: str, expected: list[str]) -> None:
    assert cut_words(name, "I'm 12345  a\n\n1") == expected


def test_other_threads_run_while_a_long_text_is_tokenized(byte_level: Tokenizer) -> None:
    beginning = threading.Event()

    def work() -> None:
        beginning.set()
        byte_level.encode("the quick brown fox " * 50_000)

    worker = threading.Thread(target=work)
    worker.start()
    beginning.wait()
    turns = 0
    while worker.is_alive():
        time.sleep(0)
        turns += 1
    # Without a break in the library's work this thread gets a turn or two at its ends.
    assert turns > 100


def test_no_token_is_longer_than_the_longest(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        longest = tokenizer.longest_token()
        assert longest is not None
        assert longest >= max(len(tokenizer.token_text(token_id)) for token_id in range(tokenizer.vocab_size))


def test_nothing_is_said_of_the_length_of_tokens_that_have_no_bytes(word_piece: Tokenizer) -> None:
    assert word_piece.longest_token() is None
