"""The opened cpu device: its claims, its memory, its caches, what closing does."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pytest
import torch

from midspan.errors import MidspanError, OutOfDeviceMemory, SettingsError
from midspan.graph.passes import apply_passes
from midspan.interface import Bounds, CacheGroup, CacheLayout, Device, PackedTensor, Weight
from midspan.models.catalogue import build_graph
from midspan.weights.quantization import dequantize
from midspan_cpu import plugin
from midspan_cpu.kernels.table import KernelSet

GROUP = CacheGroup(name="full", layers=2, kv_heads=3, key_size=8, value_size=4)


def layout(dtype: str = "float32", block_size: int = 16) -> CacheLayout:
    return CacheLayout(groups=(GROUP,), block_size=block_size, dtype=dtype)


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


class DictSource:
    """A ``WeightSource`` over arrays, some of them packed."""

    def __init__(self, arrays: dict[str, Any], packed: dict[str, PackedTensor] | None = None) -> None:
        self.arrays, self.packed, self.loads = arrays, packed or {}, 0

    def load(self, weight: Weight) -> PackedTensor:
        self.loads += 1
        if weight.name in self.packed:
            return self.packed[weight.name]
        data = np.concatenate([self.arrays[name] for name in weight.sources or (weight.name,)])
        return PackedTensor(name=weight.name, shape=weight.shape, format="dense", parts={"data": data})


def test_the_entry_point_leads_to_the_plugin() -> None:
    (entry,) = entry_points(group="midspan.plugins", name="cpu")
    assert entry.load().midspan_devices() == (plugin.PLUGIN,)


def test_the_native_library_is_there(kernel_set: KernelSet) -> None:
    assert kernel_set.native is not None, kernel_set.missing


def test_threads_default_to_the_usable_cores_and_can_be_set() -> None:
    info = plugin.PLUGIN.probe().devices[0]
    device = plugin.PLUGIN.open(info, {"threads": "1"})
    assert device.threads == 1
    assert torch.get_num_threads() == 1
    device.close()


def test_a_cache_written_in_the_canonical_layout_is_read_back(cpu_device: Device) -> None:
    cache = cpu_device.allocate_cache(layout(), (9,))
    data = np.random.default_rng(0).standard_normal((2, 2, 3, 16, 3, 8)).astype(np.float32)
    data[:, 1, ..., 4:] = 0.0  # values are narrower than keys
    cache.write("full", [5, 1, 8], data)
    np.testing.assert_array_equal(cache.read("full", [5, 1, 8]), data)
    np.testing.assert_array_equal(cache.read("full", [8, 5]), data[:, :, [2, 0]])


def test_copies_of_blocks_read_before_they_write(cpu_device: Device) -> None:
    cache = cpu_device.allocate_cache(layout("bfloat16"), (4,))
    data = np.zeros((2, 2, 3, 16, 3, 8), np.float32)
    data[:, :, 0], data[:, :, 1], data[:, :, 2] = 1.0, 2.0, 3.0
    data[:, 1, ..., 4:] = 0.0
    cache.write("full", [1, 2, 3], data)
    cache.copy("full", [(1, 2), (2, 1)])
    np.testing.assert_array_equal(cache.read("full", [1, 2, 3]), data[:, :, [1, 0, 2]])
    cache.copy("full", [])


def test_a_cache_refuses_blocks_groups_and_shapes_that_it_has_not(cpu_device: Device) -> None:
    cache = cpu_device.allocate_cache(layout(), (4,))
    with pytest.raises(IndexError, match="0 to 3"):
        cache.read("full", [4])
    with pytest.raises(MidspanError, match="no group"):
        cache.read("window", [1])
    with pytest.raises(ValueError, match="shape"):
        cache.write("full", [1], np.zeros((2, 2, 1, 16, 3, 4), np.float32))


def test_a_large_cache_takes_no_memory_before_it_is_written(cpu_device: Device) -> None:
    # 1.1 GiB; the resident set grows by less than a hundredth of it.
    blocks = 2**30 // (2 * 3 * 12 * 16 * 4)
    before = _resident_bytes()
    cache = cpu_device.allocate_cache(layout(), (blocks,))
    assert cache.memory_bytes() > 2**29
    assert _resident_bytes() - before < cache.memory_bytes() / 100
    cache.close()


def test_a_cache_larger_than_the_machine_is_refused_with_a_remedy(cpu_device: Device) -> None:
    with pytest.raises(OutOfDeviceMemory, match="kv-cache-memory-bytes"):
        cpu_device.allocate_cache(layout(), (2**40,))


def test_a_type_that_is_not_claimed_is_refused(cpu_device: Device) -> None:
    with pytest.raises(SettingsError, match="float64"):
        cpu_device.allocate_cache(layout("float64"), (4,))


def test_memory_counts_what_is_open(
    cpu_device: Device, tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    assert cpu_device.memory().used_bytes == 0
    graph = build_graph(tiny_config())
    weights = random_weights(graph)
    program = cpu_device.compile(apply_passes(graph), DictSource(weights), bounds())
    matrices = sum(array.nbytes for name, array in weights.items() if array.ndim == 2 and "embed" not in name)
    assert program.memory_bytes() >= matrices
    cache = cpu_device.allocate_cache(layout(), (10,))
    report = cpu_device.memory()
    assert report.used_bytes == program.memory_bytes() + cache.memory_bytes()
    assert 0 < report.free_bytes <= report.total_bytes
    cpu_device.close()
    assert cpu_device.memory().used_bytes == 0


def test_a_closed_program_and_a_closed_cache_are_not_used_any_more(
    cpu_device: Device, drive: Callable[..., Any], tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    graph = build_graph(tiny_config())
    driver = drive(cpu_device, graph, random_weights(graph))
    sequence = driver.sequence([1, 2, 3])
    driver.step([(sequence, 3)])
    batch, _ = driver.batch([(sequence, 1)])
    driver.cache.close()
    with pytest.raises(MidspanError, match="closed"):
        driver.program.run(batch, driver.cache)
    driver.program.close()
    with pytest.raises(MidspanError, match="closed"):
        driver.program.run(batch, driver.cache)


def test_every_node_says_which_kernel_serves_it(
    cpu_device: Device, tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    graph = build_graph(tiny_config())
    program = cpu_device.compile(graph, DictSource(random_weights(graph)), bounds(kernels={"linear": "onednn"}))
    kernels = {(placed.op, placed.kernel) for placed in program.placement.nodes}
    assert [placed.node for placed in program.placement.nodes] == [node.name for node in graph.nodes]
    assert {("linear", "onednn"), ("attention", "native"), ("logits", "native")} <= kernels


def test_without_the_native_library_the_device_works_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Any], random_weights: Callable[..., Any]
) -> None:
    monkeypatch.setenv("MIDSPAN_CPU_ISA", "none")
    device = plugin.PLUGIN.open(plugin.PLUGIN.probe().devices[0], {})
    assert not device.capabilities.batch_invariant
    assert device.capabilities.quantizations == ()
    graph = build_graph(tiny_config())
    program = device.compile(graph, DictSource(random_weights(graph)), bounds())
    served = {placed.op: placed for placed in program.placement.nodes}
    assert served["linear"].kernel == "onednn"
    assert served["attention"].kernel == "portable"
    assert "turned off" in dict(served["attention"].refused)["native"]
    device.close()


@pytest.mark.parametrize("name", ["gguf.q4_0", "gguf.q4_1", "gguf.q8_0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_give_the_tokens_of_their_unpacked_values(
    name: str,
    dtype: str,
    cpu_device: Device,
    drive: Callable[..., Any],
    tiny_config: Callable[..., Any],
    random_weights: Callable[..., Any],
) -> None:
    assert name in cpu_device.capabilities.quantizations
    graph = build_graph(tiny_config(hidden_size=64, intermediate_size=96))
    arrays = random_weights(graph)
    packed = {
        weight.name: packed_tensor(weight, arrays[weight.name], name)
        for weight in graph.weights.values()
        if len(weight.shape) == 2
    }
    plain = {**arrays, **{key: dequantize(tensor) for key, tensor in packed.items()}}
    logprobs = []
    for source in (DictSource(arrays, packed), DictSource(plain)):
        driver = drive(cpu_device, graph, source, dtype=dtype, cache_dtype=dtype)
        sequence = driver.sequence(list(range(1, 40)))
        driver.step([(sequence, 39)], num_logprobs=20)
        logprobs.append(sequence.logprobs[0])
    # Packed products round x to 16 bits of the largest of 32 columns, 2^-16; activations of bfloat16 are rounded
    # to 2^-8 after each of some 20 nodes, and a value at a border may go either way.
    allowed = 2.0**-16 * 20 * 4 if dtype == "float32" else 2.0**-8 * 20
    shared = set(logprobs[0]) & set(logprobs[1])
    assert len(shared) >= 15
    assert max(abs(logprobs[0][token] - logprobs[1][token]) for token in shared) < allowed


def packed_tensor(weight: Weight, array: Any, name: str) -> PackedTensor:
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, name.removeprefix("gguf.").upper())
    blocks = gguf.quants.quantize(array, kind)
    return PackedTensor(name=weight.name, shape=weight.shape, format=name, parts={"blocks": blocks})


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
