"""SentencePiece files, written here byte by byte after their published definition."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.text.sentencepiece_model import BPE, read_sentencepiece_model
from midspan.text.tokenizer import load_tokenizer

PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PIECES += [("▁h", -0.0, 1), ("el", -1.0, 1), ("lo", -2.0, 1), ("▁hel", -3.0, 1), ("▁hello", -4.0, 1)]
PIECES += [(letter, -10.0 - place, 1) for place, letter in enumerate("▁helo")]
PIECES += [("[INST]", 0.0, 4)]


def varint(value: int) -> bytes:
    value %= 1 << 64
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def model_bytes(*, kind: int = BPE, prefix: bool = True, eos: int = 2) -> bytes:
    data = b""
    for text, score, piece_type in PIECES:
        data += message(
            1,
            message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number_field(3, piece_type),
        )
    trainer = number_field(3, kind) + number_field(40, 0) + number_field(42, eos) + message(7, b"ignored")
    return data + message(2, trainer) + message(3, message(1, b"identity") + number_field(3, int(prefix)))


def test_pieces_and_settings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_bytes(prefix=False, eos=-1))
    model = read_sentencepiece_model(path)
    assert model.pieces == tuple(text for text, _, _ in PIECES)
    assert model.scores == tuple(score for _, score, _ in PIECES)
    assert model.types == tuple(kind for _, _, kind in PIECES)
    assert (model.kind, model.space_before_text, model.charsmap) == (BPE, False, b"")
    assert (model.unknown_id, model.bos_id, model.eos_id) == (0, 1, None)


def test_a_folder_with_such_a_file_alone_has_a_tokenizer(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("none")
    (folder / "tokenizer.model").write_bytes(model_bytes())
    tokenizer = load_tokenizer(folder)
    names = {text: index for index, (text, _, _) in enumerate(PIECES)}
    assert tokenizer.encode("hello") == [names["▁hello"]]
    assert tokenizer.encode("hé") == [names["▁h"], names["<0xC3>"], names["<0xA9>"]]
    assert tokenizer.encode("[INST]")[-1] == names["[INST]"]
    assert tokenizer.special_token_ids == {0, 1, 2}
    for text in ("hello", " hello", "hé 😀", "[INST]hello"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_another_kind_of_model_is_refused_with_a_remedy(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("none")
    (folder / "tokenizer.model").write_bytes(model_bytes(kind=1))
    with pytest.raises(UnsupportedModel) as caught:
        load_tokenizer(folder)
    assert "save_pretrained" in caught.value.remedy


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_gives_an_error_that_names_it_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(model_bytes())
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        model = read_sentencepiece_model(path)
    except CheckpointError as error:
        says = str(error)
    else:
        says = str(path)
        assert len(model.pieces) == len(model.scores) == len(model.types)
    assert str(path) in says
