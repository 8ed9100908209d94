"""What each node of a graph makes a device do: operations, bytes moved, numbers exchanged.

Computed from shapes, attributes and element types alone; knows no accelerator and no time. The
model, which ``docs/simulated-devices.md`` explains:

* a product of R rows by an ``[out, in]`` matrix is ``2 R in out`` operations; it reads its weight once
  and its input once, and writes its output once;
* attention's operations and bytes depend on each request's context, see ``AttentionWork``;
* any other node reads its inputs, writes its outputs, and does ``ELEMENTWISE_OPERATIONS`` for each number
  written;
* the experts of a mixture are such products for those that a row chose; a step reads as many experts as its rows may
  have chosen at most;
* ``split`` is a view and takes nothing; an embedding reads the rows that it is asked for.

A layer is divided over N devices as Megatron does it (Shoeybi et al. 2019, arXiv 1909.08053): matrices
with ``split="columns"`` by their outputs, with ``"rows"`` by their inputs, followed by a sum over the devices; experts
like these two, one after the other;
heads with their columns; embedding and logits by the vocabulary, with a sum and a gathering.

Invariant: with one device nothing is exchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midspan.interface.cache import CACHE_ELEMENT_BYTES, CACHE_SCALE_BYTES
from midspan.interface.graph import ACTIVATION, Graph, Node, Value
from midspan.runtimes.reference.element_types import element_type

ELEMENTWISE_OPERATIONS = 8
"""For each number that a node without weights writes. Any small count would do: such nodes are bound by bytes."""

VIEWS = frozenset(("split",))
"""Operations that move nothing."""


@dataclass(frozen=True, kw_only=True)
class NodeWork:
    """What one node costs, as a function of its number of rows.

    Attributes:
        rows: which size counts its rows: ``"T"`` or ``"S"``; anything else counts as one.
        operations: for each row.
        row_bytes: read and written for each row.
        fixed_bytes: read whatever the rows: weights.
        summed_bytes: for each row, what is then summed over all devices.
        gathered_bytes: for each row, what is then gathered from all devices, all parts together.
        chosen_bytes: read for each row, until ``chosen_limit`` bytes are: weights that rows choose.
        chosen_limit: all such weights together.
    """

    rows: str
    operations: float
    row_bytes: float
    fixed_bytes: float = 0.0
    summed_bytes: float = 0.0
    gathered_bytes: float = 0.0
    chosen_bytes: float = 0.0
    chosen_limit: float = 0.0

    def weight_bytes(self, rows: int) -> float:
        """Read of weights for so many rows."""
        return self.fixed_bytes + min(rows * self.chosen_bytes, self.chosen_limit)


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """What one attention node costs, as a function of contexts.

    A query token that sees k tokens costs ``2 heads k (key_size + value_size)`` operations. The cached
    tokens that a request's new tokens see are read once a step (the queries of one step share them), and
    the new ones are written once.

    Attributes:
        window: tokens that a token sees at most; None: all.
        pair_operations: for each query token and each token that it sees.
        token_bytes: of one token's key and value in the cache.
        row_bytes: queries read and results written, for each token of the step.
    """

    window: int | None
    pair_operations: float
    token_bytes: float
    row_bytes: float


@dataclass(frozen=True, kw_only=True)
class GraphWork:
    """A whole graph's work on each of so many devices.

    Attributes:
        devices: among which it is divided.
        nodes: equal nodes once, with their count.
        attentions: likewise.
        launches: nodes that a device is told to run.
    """

    devices: int
    nodes: tuple[tuple[NodeWork, int], ...]
    attentions: tuple[tuple[AttentionWork, int], ...]
    launches: int


def graph_work(
    graph: Graph, weight_bytes: Mapping[str, int], *, dtype: str, cache_dtype: str, devices: int = 1
) -> GraphWork:
    """Count a graph's work.

    Args:
        graph: the model.
        weight_bytes: of each weight as it is stored.
        dtype: activation type.
        cache_dtype: element type of the KV cache.
        devices: among which each layer is divided.
    """
    sizes = _Sizes(graph, weight_bytes, dtype, cache_dtype, devices)
    nodes: Counter[NodeWork] = Counter()
    attentions: Counter[AttentionWork] = Counter()
    launches = 0
    for node in graph.nodes:
        sizes.note_divided(node)
        if node.op in VIEWS:
            continue
        launches += 1
        if node.op == "attention":
            attentions[_attention(node, sizes)] += 1
        else:
            nodes[_node(node, sizes)] += 1
    return GraphWork(
        devices=devices, nodes=tuple(nodes.items()), attentions=tuple(attentions.items()), launches=launches
    )


class _Sizes:
    """Sizes of values and weights on one device, and which of them are parts."""

    def __init__(
        self, graph: Graph, weight_bytes: Mapping[str, int], dtype: str, cache_dtype: str, devices: int
    ) -> None:
        self.devices = devices
        self.cache_bytes, self.scale_bytes = CACHE_ELEMENT_BYTES[cache_dtype], CACHE_SCALE_BYTES.get(cache_dtype, 0)
        self._values = graph.values
        self._weights = graph.weights
        self._weight_bytes = weight_bytes
        self._activation_bytes = element_type(dtype).itemsize
        self._divided: set[str] = set()

    def note_divided(self, node: Node) -> None:
        """Find out whether a node's outputs are parts: columns make parts, rows join them, others pass them on."""
        divided = node.attributes.get("split") == "columns" or any(name in self._divided for name in node.inputs)
        if divided and node.attributes.get("split") != "rows" and node.op not in ("embedding", "logits", "sample"):
            self._divided.update(node.outputs)

    def row(self, name: str) -> float:
        """Bytes of one row of a value, the device's part of it."""
        return self.columns(name) * self.element(name)

    def columns(self, name: str) -> float:
        """Numbers in one row of a value, the device's part of it."""
        value = self._values[name]
        count = math.prod(size for size in value.shape[1:] if isinstance(size, int))
        return count / (self.devices if name in self._divided else 1)

    def element(self, name: str) -> int:
        """Bytes of a number."""
        return self._activation_bytes if self._values[name].dtype == ACTIVATION else 4

    def value(self, name: str) -> Value:
        """A value."""
        return self._values[name]

    def weight(self, node: Node) -> tuple[float, float]:
        """(numbers in the node's matrix, bytes of all its weights), whole."""
        numbers = math.prod(self._weights[node.weights["weight"]].shape) if "weight" in node.weights else 0
        return numbers, sum(self._weight_bytes[name] for name in node.weights.values())

    def experts(self, node: Node) -> tuple[int, int]:
        """(experts, numbers in their matrices)."""
        shapes = [self._weights[node.weights[role]].shape for role in ("gate_up", "down")]
        return shapes[0][0], sum(math.prod(shape) for shape in shapes)

    def rows(self, node: Node) -> str:
        """The symbol that counts a node's rows."""
        shape = self._values[node.outputs[0]].shape
        return str(shape[0]) if shape else "1"


def _node(node: Node, sizes: _Sizes) -> NodeWork:
    read = sum(sizes.row(name) for name in node.inputs if sizes.value(name).dtype != "sampling")
    written = sum(sizes.row(name) for name in node.outputs)
    if node.op in ("linear", "logits"):
        return _product(node, sizes, read, written)
    if node.op == "experts":
        return _experts(node, sizes, read, written)
    _, weight_bytes = sizes.weight(node)
    if node.op == "embedding":
        row = written if sizes.devices == 1 else written / sizes.devices
        summed = written if sizes.devices > 1 else 0.0
        return NodeWork(rows=sizes.rows(node), operations=0.0, row_bytes=read + row + written, summed_bytes=summed)
    if node.op == "sample":
        read = sum(sizes.row(name) for name in node.inputs[:1])
    numbers = sizes.columns(node.inputs[0]) if node.op == "sample" else sum(map(sizes.columns, node.outputs))
    return NodeWork(
        rows=sizes.rows(node),
        operations=ELEMENTWISE_OPERATIONS * numbers,
        row_bytes=read + written,
        fixed_bytes=weight_bytes,
    )


def _product(node: Node, sizes: _Sizes, read: float, written: float) -> NodeWork:
    numbers, weight_bytes = sizes.weight(node)
    split = "vocabulary" if node.op == "logits" else node.attributes.get("split")
    share = 1 if split is None else sizes.devices
    several = sizes.devices > 1
    return NodeWork(
        rows=sizes.rows(node),
        operations=2.0 * numbers / share,
        row_bytes=read + (written / share if split == "vocabulary" else written),
        fixed_bytes=weight_bytes / share,
        summed_bytes=written if several and split == "rows" else 0.0,
        gathered_bytes=written if several and split == "vocabulary" else 0.0,
    )


def _experts(node: Node, sizes: _Sizes, read: float, written: float) -> NodeWork:
    experts, numbers = sizes.experts(node)
    _, weight_bytes = sizes.weight(node)
    chosen = sizes.columns(node.inputs[1])
    return NodeWork(
        rows=sizes.rows(node),
        operations=2.0 * chosen * numbers / experts / sizes.devices,
        row_bytes=read + written,
        chosen_bytes=chosen * weight_bytes / experts / sizes.devices,
        chosen_limit=weight_bytes / sizes.devices,
        summed_bytes=written if sizes.devices > 1 else 0.0,
    )


def _attention(node: Node, sizes: _Sizes) -> AttentionWork:
    attributes: Mapping[str, Any] = node.attributes
    width = attributes["key_size"] + attributes["value_size"]
    heads = math.ceil(attributes["heads"] / sizes.devices)
    kv_heads = math.ceil(attributes["kv_heads"] / sizes.devices)
    return AttentionWork(
        window=attributes["window"],
        pair_operations=2.0 * heads * width,
        token_bytes=float(kv_heads * (width * sizes.cache_bytes + 2 * sizes.scale_bytes)),
        row_bytes=sizes.row(node.inputs[0]) + sizes.row(node.outputs[0]),
    )
