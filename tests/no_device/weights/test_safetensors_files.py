"""Safetensors files and folders of them: mapped, not copied, and refused when anything is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from midspan.errors import CheckpointError, ModelNotFound, UnsupportedModel
from midspan.weights.checkpoint import open_checkpoint
from midspan.weights.safetensors_checkpoint import read_safetensors


def encode(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path, published_tensors: Any, published_config: Any) -> Path:
    """The tiny llama in one file."""
    safetensors.numpy.save_file(published_tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(published_config))
    return tmp_path


def shard(folder: Path, tensors: dict[str, Any]) -> None:
    """Cut the one file of a folder in three, with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_holds_the_tensors_that_were_saved(
    folder: Path, published_tensors: Any, published_config: Any, sharded: bool
) -> None:
    if sharded:
        shard(folder, published_tensors)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == published_config
    assert checkpoint.generation_config == {"temperature": 0.6}
    assert set(checkpoint.tensors) == set(published_tensors)
    assert checkpoint.nbytes == sum(array.nbytes for array in published_tensors.values())
    for name, array in published_tensors.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.shape, tensor.format, tensor.dtype) == (array.shape, "dense", "float32")
        np.testing.assert_array_equal(tensor.packed().parts["data"], array)


def test_arrays_are_views_of_the_file_and_cannot_be_written_to(folder: Path) -> None:
    tensor = open_checkpoint(folder).tensors["lm_head.weight"]
    first, second = (tensor.packed().parts["data"] for _ in range(2))
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


@pytest.mark.parametrize(
    ("dtype", "name"), [(ml_dtypes.bfloat16, "BF16"), (np.float16, "F16"), (np.float64, "F64"), (np.int32, "I32")]
)
def test_element_types_are_read_exactly(tmp_path: Path, dtype: Any, name: str) -> None:
    array = (np.random.default_rng(0).standard_normal((3, 5)) * 8).astype(dtype)
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode({"x": entry(name, [3, 5], 0, array.nbytes)}, array.tobytes()))
    tensor = read_safetensors(path)["x"]
    assert tensor.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(tensor.packed().parts["data"], array)


def test_data_off_its_natural_alignment_is_read_into_an_aligned_array(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    header = json.dumps({"x": entry("F32", [6], 0, 24)}).encode()
    header += b" " * (1 + -len(header) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(header, array.tobytes()))
    data = read_safetensors(path)["x"].packed().parts["data"]
    assert data.flags.aligned
    np.testing.assert_array_equal(data, array)


def test_an_empty_tensor_and_a_scalar_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode({"none": entry("F32", [0, 4], 0, 0), "one": entry("F32", [], 0, 4)}, bytes(4)))
    assert {name: tensor.shape for name, tensor in read_safetensors(path).items()} == {"none": (0, 4), "one": ()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\x01\x02", "no room for its header"),
        (struct.pack("<Q", 1 << 60) + bytes(64), "no room for its header"),
        (encode(b"{not json}"), "JSON"),
        (encode(b"[" * 100_000), "JSON"),
        (encode(b"\xff\xfe{}"), "JSON"),
        (encode([1, 2]), "no JSON object"),
        (encode(b'{"x": {"dtype": "F32"}}'), "'x' is invalid"),
        (encode({"x": 3}), "'x' is invalid"),
        (encode({"x": entry("F32", [True], 0, 4)}, bytes(4)), "'x' is invalid"),
        (encode({"x": entry("F32", [-1], 0, 4)}, bytes(4)), "'x' is invalid"),
        (encode({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "'x' is invalid"),
        (encode({"x": entry("Q7", [1], 0, 4)}, bytes(4)), "Q7"),
        (encode({"x": entry("F32", [2], 0, 4)}, bytes(4)), "cannot take 4 bytes"),
        (encode({"x": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4)), "cannot take 4 bytes"),
        (encode({"x": entry("F32", [4], 0, 16)}, bytes(15)), "the download stopped early"),
        (encode({"x": entry("F32", [4], 0, 16)}, bytes(17)), "belong to nothing"),
        (encode({"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, bytes(12)), "overlaps"),
        (encode({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 8, 12)}, bytes(12)), "hole"),
        (encode(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":3}', bytes(1)), "JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_safetensors(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bytes")

    def open_bytes(content: bytes) -> dict[str, Any]:
        path = folder / "model.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return {name: tensor.packed() for name, tensor in read_safetensors(path).items()}

    return open_bytes


VALID = encode(
    {"a": entry("BF16", [3, 4], 0, 24), "bb": entry("F32", [5], 24, 44), "__metadata__": {"format": "pt"}}, bytes(44)
)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, len(VALID) - 1))
def test_a_file_cut_anywhere_is_refused(opened: Callable[[bytes], Any], length: int) -> None:
    with pytest.raises(CheckpointError):
        opened(VALID[:length])


@settings(max_examples=500, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 45), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes_never_give_anything_but_a_checkpoint_error(
    opened: Callable[[bytes], Any], edits: list[tuple[int, int]]
) -> None:
    content = bytearray(VALID)
    for position, value in edits:
        content[position] = value
    with suppress(CheckpointError):
        opened(bytes(content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(header=json_values)
def test_any_json_as_header_is_refused_or_read(opened: Callable[[bytes], Any], header: Any) -> None:
    with suppress(CheckpointError):
        opened(encode(header, bytes(8)))


def test_a_missing_shard_is_named(folder: Path, published_tensors: Any) -> None:
    shard(folder, published_tensors)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors"):
        open_checkpoint(folder)


def test_an_index_that_names_a_tensor_which_its_shard_lacks_is_refused(folder: Path, published_tensors: Any) -> None:
    shard(folder, published_tensors)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}']
)
def test_a_broken_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)


def test_several_files_without_an_index_are_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"a": ' * 50_000])
def test_a_missing_or_invalid_config_is_refused(folder: Path, content: str | None) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_pickled_weights_are_refused_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_without_a_model_and_no_folder_at_all_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFound, match="absent"):
        open_checkpoint(tmp_path / "absent")


def test_a_folder_that_says_how_it_is_quantized_is_opened_as_any(folder: Path, published_config: Any) -> None:
    config = {**published_config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).config == config


@pytest.mark.parametrize("field", ["torch_dtype", "dtype", None])
def test_the_published_element_type_is_read_from_the_config_or_the_tensors(
    folder: Path, published_config: Any, field: str | None
) -> None:
    config = {key: value for key, value in published_config.items() if key != "torch_dtype"}
    (folder / "config.json").write_text(json.dumps(config | ({field: "bfloat16"} if field else {})))
    assert open_checkpoint(folder).dtype == ("bfloat16" if field else "float32")
