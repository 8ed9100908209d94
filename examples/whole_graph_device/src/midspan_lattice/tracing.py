"""A whole graph as expressions for one bucket, and what of it stays with the host.

The host keeps the choice of tokens, which has a definition that all devices share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midspan.errors import UnsupportedOperation
from midspan.interface import Graph, Node
from midspan.interface.graph import ACTIVATION
from midspan_lattice.attention import Pages, attention
from midspan_lattice.buckets import Sizes, element, rounded, shape
from midspan_lattice.expression import Expression, from_host, leaf, pointwise
from midspan_lattice.lowering import FUNCTIONS, LOWERINGS

ON_HOST = "sample"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Which part of a graph runs where.

    Attributes:
        device: nodes in order.
        host: the sample nodes behind them.
        fetched: values that come back from the device.
    """

    device: tuple[Node, ...]
    host: tuple[Node, ...]
    fetched: tuple[str, ...]


def split(graph: Graph, device_id: str) -> Split:
    """Divide a graph.

    Raises:
        UnsupportedOperation: an operation or function without lowering, or one that needs a sampled token.
    """
    host = tuple(node for node in graph.nodes if node.op == ON_HOST)
    device = tuple(node for node in graph.nodes if node.op != ON_HOST)
    sampled = {name for node in host for name in node.outputs}
    for node in device:
        reason = _reason(node, sampled)
        if reason:
            raise UnsupportedOperation(
                f"The device '{device_id}' cannot run node '{node.name}' ({node.op}): {reason}.",
                node=node.name,
                reasons=(f"lattice: {reason}",),
                remedy="Take another device.",
            )
    produced = {name for node in device for name in node.outputs}
    wanted = [*(name for node in host for name in node.inputs), *graph.outputs]
    return Split(device=device, host=host, fetched=tuple(dict.fromkeys(n for n in wanted if n in produced)))


def _reason(node: Node, sampled: set[str]) -> str | None:
    if sampled.intersection(node.inputs):
        return "it reads what the host samples"
    if node.op not in (*LOWERINGS, "attention", "add_rms_norm"):
        return "there is no lowering for it"
    function = node.attributes.get("function")
    return None if function is None or function in FUNCTIONS else f"there is no function {function!r}"


def page_names(group: object, layer: object) -> tuple[str, str]:
    """Under which names a layer's keys and values are bound."""
    return f"keys of {group} {layer}", f"values of {group} {layer}"


def trace(graph: Graph, parts: Split, sizes: Sizes, *, dtype: str, block_size: int) -> list[Expression]:
    """The fetched values as expressions over inputs, weights and pages.

    Args:
        graph: checked.
        parts: which nodes are lowered.
        sizes: of the bucket.
        dtype: the activation type.
        block_size: tokens of a page.
    """
    values = {
        name: from_host(name, shape(graph.values[name].shape, sizes), element(graph.values[name]))
        for name in graph.inputs
        if graph.values[name].dtype != "sampling"
    }
    weights = {name: leaf(name, weight.shape) for name, weight in graph.weights.items()}
    for node in parts.device:
        inputs = tuple(values[name] for name in node.inputs)
        own = {role: weights[name] for role, name in node.weights.items()}
        if node.op == "attention":
            keys, past_values = page_names(node.attributes["group"], node.attributes["layer"])
            pages = Pages(keys=keys, values=past_values, block_size=block_size)
            results = [attention(inputs, own.get("sinks"), node.attributes, pages)]
        elif node.op == "add_rms_norm":
            total = _round(inputs[0] + inputs[1], dtype)
            results = [*LOWERINGS["rms_norm"]((total,), own, node.attributes), total]
        else:
            results = LOWERINGS[node.op](inputs, own, node.attributes)
        for name, result in zip(node.outputs, results, strict=True):
            values[name] = _round(result, dtype) if graph.values[name].dtype == ACTIVATION else result
    return [values[name] for name in parts.fetched]


def _round(x: Expression, dtype: str) -> Expression:
    def run(array: Any) -> Any:
        return rounded(array, dtype)

    return x if dtype == "float32" else pointwise(run, x)
