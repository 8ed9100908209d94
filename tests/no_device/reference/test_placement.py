"""Kernels are chosen by willingness, priority and wish, and every refusal is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from midspan.errors import SettingsError, UnsupportedOperation
from midspan.interface import Bounds, Graph, Kernel, KernelSite, No, PackedTensor, Placement, Support, Yes
from midspan.models.catalogue import build_graph
from midspan.runtimes.placement import choose_kernels

BOUNDS = Bounds(
    max_tokens=12,
    max_requests=3,
    max_context=50,
    max_sampled_rows=4,
    block_size=1,
    dtype="bfloat16",
    cache_dtype="float16",
)
DOWN = "model.layers.0.mlp.down_proj"


def _nothing(site: KernelSite) -> Any:
    return site


def _even_rows_only(site: KernelSite) -> Support:
    rows = site.weights["weight"].shape[0]
    return Yes() if rows % 64 == 0 else No(f"{rows} rows are no multiple of 64")


def _never(site: KernelSite) -> Support:
    return No("never")


def _portable(graph: Graph) -> list[Kernel]:
    return [Kernel(name="portable", op=op, prepare=_nothing) for op in sorted({node.op for node in graph.nodes})]


@pytest.fixture
def graph(tiny_config: Any) -> Graph:
    return build_graph(tiny_config(intermediate_size=64))


def _choose(
    graph: Graph, table: list[Kernel], portable: list[Kernel] | None = None, bounds: Bounds = BOUNDS
) -> tuple[Placement, dict[str, tuple[Kernel, KernelSite]]]:
    weights = {
        name: PackedTensor(name=name, shape=weight.shape, format="dense", parts={})
        for name, weight in graph.weights.items()
    }
    return choose_kernels(graph, table, _portable(graph) if portable is None else portable, weights, bounds, "toy")


def _by_name(placement: Placement) -> dict[str, Any]:
    return {node.node: node for node in placement.nodes}


def test_the_willing_kernel_of_the_highest_priority_serves_and_refusals_are_kept(graph: Graph) -> None:
    table = [
        Kernel(name="slow", op="linear", prepare=_nothing, priority=1),
        Kernel(name="fast", op="linear", prepare=_nothing, priority=9, supports=_even_rows_only),
    ]
    placement, chosen = _choose(graph, table)
    nodes = _by_name(placement)
    assert list(nodes) == [node.name for node in graph.nodes] == list(chosen)
    up, down = nodes["model.layers.0.mlp.up_proj"], nodes[DOWN]
    assert (up.kernel, up.refused, up.fallback) == ("fast", (), False)
    assert (down.kernel, down.refused) == ("slow", (("fast", "32 rows are no multiple of 64"),))
    assert nodes["model.norm"].kernel == "portable"
    assert nodes["model.norm"].fallback


def test_the_site_tells_all_that_is_known(graph: Graph) -> None:
    _, chosen = _choose(graph, [])
    site = chosen[DOWN][1]
    assert [value.shape for value in (*site.inputs, *site.outputs)] == [("T", 64), ("T", 32)]
    assert site.weights["weight"].name == f"{DOWN}.weight"
    assert (site.dtype, site.cache_dtype, site.block_size) == ("bfloat16", "float16", 1)
    assert (site.max_tokens, site.max_requests, site.max_context, site.max_sampled_rows) == (12, 3, 50, 4)


def test_at_equal_priority_the_table_goes_before_the_portable_kernel(graph: Graph) -> None:
    placement, _ = _choose(graph, [Kernel(name="own", op="linear", prepare=_nothing)])
    assert _by_name(placement)[DOWN].kernel == "own"


def test_a_kernel_that_is_asked_for_serves_where_it_can(graph: Graph) -> None:
    table = [
        Kernel(name="usual", op="linear", prepare=_nothing, priority=9),
        Kernel(name="wanted", op="linear", prepare=_nothing, priority=1, supports=_even_rows_only),
    ]
    nodes = _by_name(_choose(graph, table, bounds=replace(BOUNDS, kernels={"linear": "wanted"}))[0])
    assert nodes["model.layers.0.mlp.up_proj"].kernel == "wanted"
    assert nodes[DOWN].kernel == "usual"
    assert nodes[DOWN].refused == (("wanted", "32 rows are no multiple of 64"),)


def test_an_unknown_kernel_or_operation_is_refused_with_the_known_ones(graph: Graph) -> None:
    table = [Kernel(name="own", op="linear", prepare=_nothing)]
    with pytest.raises(SettingsError, match="own, portable"):
        _choose(graph, table, bounds=replace(BOUNDS, kernels={"linear": "warp"}))
    with pytest.raises(SettingsError, match="rms_norm"):
        _choose(graph, table, bounds=replace(BOUNDS, kernels={"liner": "own"}))


def test_a_node_that_nothing_serves_is_an_error_with_every_reason(graph: Graph) -> None:
    table = [Kernel(name=name, op="rotary", prepare=_nothing, supports=_never) for name in ("one", "two")]
    portable = [kernel for kernel in _portable(graph) if kernel.op != "rotary"]
    with pytest.raises(UnsupportedOperation, match="toy") as caught:
        _choose(graph, table, portable)
    assert caught.value.node == "model.layers.0.self_attn.rotary"
    assert caught.value.reasons == ("one: never", "two: never")


def test_a_node_without_any_kernel_is_an_error_too(graph: Graph) -> None:
    with pytest.raises(UnsupportedOperation, match="embedding"):
        _choose(graph, [], [])


def test_strict_makes_a_fallback_an_error_unless_it_was_asked_for(graph: Graph) -> None:
    strict = replace(BOUNDS, strict=True)
    portable = _portable(graph)
    with pytest.raises(UnsupportedOperation, match="portable"):
        _choose(graph, [], portable, strict)
    _choose(graph, portable, portable, strict)
    wished = replace(strict, kernels={kernel.op: "portable" for kernel in portable})
    assert not any(node.fallback for node in _choose(graph, [], portable, wished)[0].nodes)
