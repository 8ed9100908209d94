"""The torch runtime: its generated code, its loading of weights, its looking inside."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import ml_dtypes
import numpy as np
import pytest
import torch

from midspan.errors import GraphError, UnsupportedOperation
from midspan.graph.passes import apply_passes
from midspan.interface import Bounds, Graph, Kernel, KernelSite, No, PackedTensor, Weight
from midspan.models.catalogue import build_graph
from midspan.runtimes.torch.code_generation import generate
from midspan.runtimes.torch.element_types import borrow, copy_in, copy_out
from midspan.runtimes.torch.preparation import OncePerStep, Preparation
from midspan.runtimes.torch.program import TorchRuntime

HOST = torch.device("cpu")


class CountingSource:
    """A ``WeightSource`` that knows what it gave out and what of that is still held by someone."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays
        self.loads: list[str] = []
        self.given: WeakSet[PackedTensor] = WeakSet()

    def load(self, weight: Weight) -> PackedTensor:
        self.loads.append(weight.name)
        data = np.concatenate([self.arrays[name] for name in weight.sources or (weight.name,)])
        tensor = PackedTensor(name=weight.name, shape=weight.shape, format="dense", parts={"data": data})
        self.given.add(tensor)
        return tensor


@pytest.fixture
def graph(tiny_config: Callable[..., Any]) -> Graph:
    return apply_passes(build_graph(tiny_config(tie_word_embeddings=True)))


@pytest.fixture
def weights(tiny_config: Callable[..., Any], random_weights: Callable[..., Any]) -> CountingSource:
    return CountingSource(random_weights(build_graph(tiny_config(tie_word_embeddings=True))))


def bounds(**changes: Any) -> Bounds:
    values: dict[str, Any] = {
        "max_tokens": 64,
        "max_requests": 4,
        "max_context": 128,
        "max_sampled_rows": 4,
        "block_size": 16,
        "dtype": "float32",
        "cache_dtype": "float32",
    }
    return Bounds(**{**values, **changes})


def runtime(**options: Any) -> TorchRuntime:
    return TorchRuntime(device="cpu", device_id="host", **options)


def test_the_code_has_one_call_for_each_node_and_frees_what_is_not_read_again(graph: Graph) -> None:
    code = generate(graph)
    lines = [line.strip() for line in code.source.splitlines()]
    calls = [line for line in lines if " = k" in line]
    assert len(calls) == len(graph.nodes)
    freed = [name for line in lines if line.startswith("del ") for name in line[4:].split(", ")]
    kept = {*code.results}
    assert len(freed) == len(set(freed))
    assert set(freed) | kept >= {name for instruction in code.instructions for name in instruction.targets}
    assert not kept & set(freed)


def test_no_text_of_a_model_gets_into_the_code(graph: Graph) -> None:
    from dataclasses import replace

    wicked = "x'); raise SystemExit('"
    nodes = tuple(replace(node, name=f"{wicked}{number}") for number, node in enumerate(graph.nodes))
    source = generate(replace(graph, nodes=nodes, name=wicked)).source
    assert "SystemExit" not in source
    allowed = {"def", "bind", "step", "cache", "return", "del"}
    words = {word for word in "".join(c if c.isalnum() else " " for c in source).split() if word not in allowed}
    assert all(word[0] in "vk" and word[1:].isdigit() for word in words)


def test_each_weight_is_loaded_once_and_let_go(graph: Graph, weights: CountingSource) -> None:
    program = runtime().compile(graph, weights, bounds())
    assert sorted(weights.loads) == sorted(graph.weights)
    tied = next(weight for name, weight in graph.weights.items() if "embed" in name)
    total = sum(4 * int(np.prod(weight.shape)) for weight in graph.weights.values())
    # The tied table exists once: every weight is counted a single time.
    assert tied.name in weights.loads
    assert program.memory_bytes() < total * 1.02 + 10 * 2**20
    gc.collect()
    assert not weights.given


def test_values_inside_a_step_can_be_looked_at_and_timed(
    graph: Graph, weights: CountingSource, drive: Callable[..., Any]
) -> None:
    class Host:
        def compile(self, *arguments: Any) -> Any:
            return runtime().compile(*arguments)

        def allocate_cache(self, *arguments: Any) -> Any:
            return runtime().allocate_cache(*arguments)

    driver = drive(Host(), graph, weights)
    sequence = driver.sequence([5, 6, 7])
    batch, _ = driver.batch([(sequence, 3)])
    embedding = next(node for node in graph.nodes if node.op == "embedding")
    found = driver.program.values(batch, driver.cache, embedding.outputs)
    np.testing.assert_array_equal(found[embedding.outputs[0]], weights.arrays["model.embed_tokens.weight"][[5, 6, 7]])
    times = driver.program.profile(batch, driver.cache, repeat=2)
    assert [time.node for time in times] == [node.name for node in graph.nodes]
    assert all(time.nanoseconds > 0 for time in times)
    assert embedding.name in driver.program.listing()


def test_strict_refuses_portable_kernels_and_says_what_refused(graph: Graph, weights: CountingSource) -> None:
    def table(preparation: Preparation) -> list[Kernel]:
        def supports(site: KernelSite) -> No:
            return No("rows are too wide")

        return [Kernel(name="picky", op="embedding", prepare=lambda site: torch.relu, supports=supports)]

    program = runtime(kernels=table).compile(graph, weights, bounds())
    assert program.placement.nodes[0].refused == (("picky", "rows are too wide"),)
    with pytest.raises(UnsupportedOperation, match="rows are too wide"):
        runtime(kernels=table).compile(graph, weights, bounds(strict=True))


def test_a_graph_without_a_sample_node_is_evaluated_but_not_run(graph: Graph, weights: CountingSource) -> None:
    from dataclasses import replace

    first = graph.nodes[0]
    short = replace(graph, nodes=(first,), outputs=first.outputs)
    program = runtime().compile(short, weights, bounds())
    inputs: dict[str, Any] = dict.fromkeys(short.inputs)
    inputs["token_ids"] = np.array([3, 1], np.int32)
    (rows,) = program.evaluate(inputs)
    assert rows.shape == (2, graph.hidden_size)
    with pytest.raises(GraphError, match="evaluate"):
        program.run(None, None)  # type: ignore[arg-type]


def test_something_derived_once_in_a_step_is_derived_again_for_other_inputs() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x * 2

    once = OncePerStep(double)
    first, second = torch.ones(2), torch.ones(2)
    assert once(first) is once(first)
    assert once(second) is not once(first)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_of_every_type_become_tensors_even_when_they_cannot_be_written(dtype: Any) -> None:
    array = np.linspace(-3, 3, 3 * 700_001).astype(dtype).reshape(3, -1)
    array.flags.writeable = False
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        tensor = copy_in(array, wanted, HOST)
        expected = torch.from_numpy(array.astype(np.float32)).to(wanted)
        assert torch.equal(tensor, expected)
    assert copy_out(copy_in(array, torch.float32, HOST)).shape == array.shape


def test_a_batchs_arrays_are_borrowed_and_not_copied() -> None:
    array = np.arange(5, dtype=np.int32)
    tensor = borrow(array, HOST)
    array[2] = 9
    assert tensor[2] == 9
    array.flags.writeable = False
    assert borrow(array, HOST).tolist() == [0, 1, 9, 3, 4]
