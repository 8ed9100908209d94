"""Random weights for a config alone: right in shape and type, the same everywhere, and lazy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midspan.errors import CheckpointError, MidspanError, ModelNotFound, UnsupportedModel
from midspan.graph.passes import apply_passes
from midspan.interface import Graph
from midspan.models.catalogue import build_graph
from midspan.settings import EngineSettings, read_environment
from midspan.weights import dummy_weights
from midspan.weights.checkpoint import Checkpoint, open_checkpoint
from midspan.weights.dummy_weights import dummy_tensor, with_dummy_weights
from midspan.weights.resolve import resolve_model
from midspan.weights.store import CheckpointWeights

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def opened(tmp_path: Path, tiny_config: Config) -> Callable[..., tuple[Checkpoint, Graph]]:
    def make(**fields: Any) -> tuple[Checkpoint, Graph]:
        (tmp_path / "config.json").write_text(json.dumps(tiny_config(**fields)))
        checkpoint = open_checkpoint(tmp_path, weights=False)
        graph = build_graph(checkpoint.config)
        return with_dummy_weights(checkpoint, graph), graph

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_has_the_shape_of_the_graph_and_the_type_of_the_config(opened: Any, dtype: str) -> None:
    checkpoint, graph = opened(torch_dtype=dtype)
    weights = CheckpointWeights(checkpoint, quantizations=())
    loaded = [weights.load(weight) for weight in graph.weights.values()]
    assert [tensor.shape for tensor in loaded] == [weight.shape for weight in graph.weights.values()]
    assert {str(tensor.parts["data"].dtype) for tensor in loaded} == {dtype}
    assert sum(tensor.nbytes() for tensor in loaded) == checkpoint.nbytes
    assert checkpoint.dtype == dtype


def test_a_config_that_names_no_type_gives_float32(opened: Any) -> None:
    assert opened()[0].dtype == "float32"


def test_merged_weights_are_their_parts_one_below_the_other(opened: Any) -> None:
    checkpoint, graph = opened()
    weights = CheckpointWeights(checkpoint, quantizations=())
    merged = [weight for weight in apply_passes(graph).weights.values() if len(weight.sources) > 1]
    assert merged
    for weight in merged:
        parts = [weights.load(graph.weights[name]).parts["data"] for name in weight.sources]
        np.testing.assert_array_equal(weights.load(weight).parts["data"], np.concatenate(parts))


def test_no_number_is_made_before_it_is_asked_for(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = dummy_weights.dummy_tensor

    def noting(name: str, shape: tuple[int, ...], dtype: str) -> Any:
        made.append(name)
        return original(name, shape, dtype)

    monkeypatch.setattr(dummy_weights, "dummy_tensor", noting)
    checkpoint, graph = opened(torch_dtype="bfloat16")
    assert checkpoint.nbytes == sum(2 * int(np.prod(weight.shape)) for weight in graph.weights.values())
    assert made == []
    CheckpointWeights(checkpoint, quantizations=()).load(graph.weights["model.norm.weight"])
    assert made == ["model.norm.weight"]


def test_the_numbers_are_those_of_the_name_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here = dummy_tensor("a.weight", (7, 33), "float32")
    program = (
        "import sys\nfrom midspan.weights.dummy_weights import dummy_tensor\n"
        "sys.stdout.write(dummy_tensor('a.weight', (7, 33), 'float32').tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert bytes.fromhex(done.stdout) == here.tobytes()
    assert not np.array_equal(here, dummy_tensor("b.weight", (7, 33), "float32"))
    monkeypatch.setattr(dummy_weights, "_CHUNK", 8)  # made in pieces, the same numbers
    np.testing.assert_array_equal(dummy_tensor("a.weight", (7, 33), "float32"), here)


def test_matrices_keep_the_size_of_what_they_multiply_and_norms_lie_around_one() -> None:
    matrix = dummy_tensor("model.layers.0.mlp.up_proj.weight", (512, 256), "float32").astype(np.float64)
    # The mean of n squares of uniform numbers of variance v has the deviation v * sqrt(0.8 / n).
    assert abs((matrix**2).mean() * 256 - 1) < 6 * (0.8 / matrix.size) ** 0.5
    assert abs(matrix.mean()) < 6 * (1 / 256 / matrix.size) ** 0.5
    assert abs(dummy_tensor("model.norm.weight", (4096,), "bfloat16").astype(np.float32) - 1).max() < 0.06
    assert abs(dummy_tensor("q_proj.bias", (4096,), "float32")).max() <= 0.05


def test_a_deep_model_of_random_weights_has_finite_logits_in_half_precision(
    opened: Any, drive: Any, reference_device: Any
) -> None:
    checkpoint, graph = opened(num_hidden_layers=12, torch_dtype="float16")
    driver = drive(reference_device, graph, CheckpointWeights(checkpoint, quantizations=()), dtype="float16")
    (sequence,) = driver.generate([list(range(40))], 4)
    batch, _ = driver.batch([(sequence, 1)])
    result = driver.program.run(batch, driver.cache).result()
    assert result.invalid is None or not result.invalid.any()
    logits = driver.program.values(batch, driver.cache, [graph.nodes[-1].inputs[0]])
    assert np.isfinite(next(iter(logits.values())).astype(np.float32)).all()


def test_weights_beside_the_config_are_not_looked_at(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "m.gguf").write_bytes(b"damaged")
    environment = read_environment({"MIDSPAN_CACHE": str(tmp_path), "MIDSPAN_OFFLINE": "1"})
    assert resolve_model(str(tmp_path), environment=environment, weights=False) == tmp_path
    assert open_checkpoint(tmp_path, weights=False).tensors == {}
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_what_has_no_config_cannot_have_dummy_weights(tmp_path: Path) -> None:
    cases: list[tuple[Path, type[MidspanError], str]] = [
        (tmp_path, CheckpointError, "config.json"),
        (tmp_path / "m.gguf", CheckpointError, "a GGUF file"),
        (tmp_path / "nothing", ModelNotFound, "nothing"),
    ]
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path, kind, text in cases:
        with pytest.raises(kind, match=text):
            open_checkpoint(path, weights=False)


def test_a_quantized_config_is_refused_because_its_sizes_would_be_wrong(tmp_path: Path, tiny_config: Config) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(quantization_config={"quant_method": "awq"})))
    checkpoint = open_checkpoint(tmp_path, weights=False)
    with pytest.raises(UnsupportedModel, match="awq") as caught:
        with_dummy_weights(checkpoint, build_graph(checkpoint.config))
    assert "--quantization" in caught.value.remedy


def test_an_unknown_load_format_is_refused() -> None:
    with pytest.raises(MidspanError, match="Take auto or dummy"):
        EngineSettings(load_format="fast")
    assert not EngineSettings(load_format="dummy").reads_weights
