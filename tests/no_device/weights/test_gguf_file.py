"""The GGUF container: what a file says is read exactly, and a broken file is only ever refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.gguf_file import GgufFile, read_gguf
from midspan.weights.gguf_checkpoint import open_gguf_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_gguf: Any, published_tensors: Any) -> Path:
    path: Path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", published_tensors, kind="Q8_0")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], GgufFile]:
    """Open bytes as a file; each time another file, for the former one may still be mapped."""
    folder = tmp_path_factory.mktemp("bytes")

    def open_bytes(content: bytes) -> GgufFile:
        path = folder / "model.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return read_gguf(path)

    return open_bytes


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def file_of(entries: bytes, count: int, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + entries + tensors


def read_everything(file: GgufFile) -> None:
    for key in file.metadata:
        file.metadata[key]
    for tensor in file.tensors.values():
        tensor.data.sum()


@pytest.mark.parametrize("source", ["tiny", "real"])
def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(
    source: str, model: Path, request: pytest.FixtureRequest
) -> None:
    path = model if source == "tiny" else request.getfixturevalue("smollm2")
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(theirs)
    for key, field in theirs.items():
        if key == "test.nested":  # the package's reader flattens it
            assert [inner.tolist() for inner in file.metadata[key]] == [[1, 2], [3]]
            continue
        value = file.metadata[key]
        plain = value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value
        assert plain == field.contents(), key
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        assert file.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(file.tensors[tensor.name].data, tensor.data.view(np.uint8))


def test_arrays_cannot_be_written_to(model: Path) -> None:
    file = read_gguf(model)
    assert not file.metadata["tokenizer.ggml.scores"].flags.writeable
    assert not file.tensors["output_norm.weight"].data.flags.writeable


def test_version_2_is_read(opened: Callable[[bytes], GgufFile]) -> None:
    file = opened(file_of(text("a") + struct.pack("<II", 4, 7), 1, version=2))
    assert (file.version, dict(file.metadata)) == (2, {"a": 7})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"GG", "does not begin"),
        (b"PK\x03\x04" + bytes(100), "does not begin"),
        (b"GGUF", "header"),
        (file_of(b"", 0, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (file_of(b"", 2**62), "more than fit"),
        (file_of(b"", 0, tensor_count=2**60), "more than fit"),
        (file_of(struct.pack("<Q", 2**63) + bytes(30), 1), "more than fit"),
        (file_of(text("a") + struct.pack("<I", 99) + bytes(8), 1), "type 99"),
        (file_of(text("a") + struct.pack("<IB", 7, 2) + bytes(8), 1), "boolean"),
        (file_of(text("a") + struct.pack("<II", 4, 1) + text("a") + struct.pack("<II", 4, 1), 2), "twice"),
        (file_of(text("a") + struct.pack("<IIQ", 9, 8, 2**61), 1), "more than fit"),
        (file_of(text("a") + struct.pack("<IIQQ", 9, 8, 1, 2**63), 1), "past its end"),
        (file_of(text("a") + struct.pack("<IIQ", 9, 77, 0), 1), "type 77"),
        (file_of(text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9 + bytes(12), 1), "nested"),
        (file_of(text("general.alignment") + struct.pack("<II", 4, 0), 1), "power of two"),
        (file_of(text("general.alignment") + struct.pack("<IIQB", 9, 0, 1, 4), 1), "power of two"),
    ],
)
def test_a_broken_header_is_refused_with_its_reason(
    opened: Callable[[bytes], GgufFile], content: bytes, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(content)
    assert "model.gguf" in caught.value.message
    assert caught.value.remedy


def tensor_info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("tensors", "count", "says"),
    [
        (tensor_info("w", (32, 4), 0, 0), 1, "its header speaks of"),
        (tensor_info("w", (2**62, 2**62), 0, 0), 1, "its header speaks of"),
        (tensor_info("w", (4,), 0, 2**63), 1, "its header speaks of"),
        (tensor_info("w", (33,), 8, 0), 1, "no multiple of 32"),
        (tensor_info("w", (4,), 77, 0), 1, "type 77"),
        (tensor_info("w", (4,), 0, 4), 1, "alignment"),
        (tensor_info("w", (1, 1, 1, 1, 1), 0, 0), 1, "5 dimensions"),
        (tensor_info("w", (), 0, 0) + bytes(8), 1, "0 dimensions"),
        (tensor_info("w", (16,), 0, 0) + tensor_info("v", (16,), 0, 32) + bytes(200), 2, "overlaps"),
        (tensor_info("w", (8,), 0, 0) + tensor_info("w", (8,), 0, 32) + bytes(200), 2, "twice"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_with_its_reason(
    opened: Callable[[bytes], GgufFile], tensors: bytes, count: int, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        opened(file_of(b"", 0, tensors, count))


def test_text_that_is_no_utf8_is_refused_when_it_is_asked_for(opened: Callable[[bytes], GgufFile]) -> None:
    file = opened(file_of(text("a") + struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\xfe", 1))
    with pytest.raises(CheckpointError, match="UTF-8"):
        file.metadata["a"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


@settings(max_examples=200, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(opened: Callable[[bytes], GgufFile], model: Path, share: float) -> None:
    content = model.read_bytes()
    with pytest.raises(CheckpointError):
        opened(content[: int(share * len(content))])


edits = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(edits=edits)
def test_changed_bytes_never_give_anything_but_a_checkpoint_error(
    opened: Callable[[bytes], GgufFile], model: Path, edits: list[tuple[int, int]]
) -> None:
    content = bytearray(model.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    with suppress(CheckpointError):
        read_everything(opened(bytes(content)))


@settings(max_examples=400, deadline=None)
@given(edits=edits)
def test_changed_bytes_never_break_the_opening_of_a_model(
    tmp_path_factory: pytest.TempPathFactory, model: Path, edits: list[tuple[int, int]]
) -> None:
    content = bytearray(model.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with suppress(CheckpointError, UnsupportedModel):
        for tensor in open_gguf_checkpoint(path).tensors.values():
            tensor.packed()


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_after_the_magic_are_refused_or_read(opened: Callable[[bytes], GgufFile], content: bytes) -> None:
    with suppress(CheckpointError):
        read_everything(opened(b"GGUF\x03\x00\x00\x00" + content))
