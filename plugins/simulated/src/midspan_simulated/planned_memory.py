"""What a model takes of a device's memory when nothing of it is really there.

Arithmetic over shapes; knows no device. With N devices that split each layer the figures are of all
N together, so what every device keeps whole counts N times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from midspan.interface.cache import CacheGroup, CacheLayout, packed_block_bytes
from midspan.interface.device import Bounds
from midspan.interface.graph import ACTIVATION, Graph, Value
from midspan.runtimes.reference.element_types import element_type


def weights_bytes(graph: Graph, stored: Mapping[str, int], devices: int) -> int:
    """Bytes of all weights on all devices.

    Args:
        graph: which nodes say how a weight is divided.
        stored: bytes of each weight, once.
        devices: among which it is divided.
    """
    divided = {
        node.weights["weight"]
        for node in graph.nodes
        if node.op in ("embedding", "logits") or (node.op == "linear" and node.attributes["split"] is not None)
    }
    return sum(size if name in divided else size * devices for name, size in stored.items())


def cache_block_bytes(layout: CacheLayout, devices: int) -> tuple[int, ...]:
    """Bytes of one block of each group on all devices; a head that does not divide is kept by several."""

    def size(group: CacheGroup, whole: int) -> int:
        return whole * devices * math.ceil(group.kv_heads / devices) // group.kv_heads

    return tuple(size(*each) for each in zip(layout.groups, packed_block_bytes(layout), strict=True))


def activation_bytes(graph: Graph, bounds: Bounds, devices: int) -> int:
    """Bytes of the values that live at the same time in the largest step, counted whole on every device."""
    sizes = {
        "T": bounds.max_tokens,
        "B": bounds.max_requests,
        "B+1": bounds.max_requests + 1,
        "S": bounds.max_sampled_rows,
        "L": 20,
    }
    blocks = math.ceil(bounds.max_context / bounds.block_size)
    sizes |= {f"M.{group.name}": blocks for group in graph.cache}
    element = element_type(bounds.dtype).itemsize

    def size(value: Value) -> int:
        count = math.prod(dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in value.shape)
        return count * (element if value.dtype == ACTIVATION else 4)

    last = {name: place for place, node in enumerate(graph.nodes) for name in node.inputs}
    alive = {name: size(graph.values[name]) for name in graph.inputs}
    peak = 0
    for place, node in enumerate(graph.nodes):
        alive |= {name: size(graph.values[name]) for name in node.outputs}
        peak = max(peak, sum(alive.values()))
        for name in (*node.inputs, *node.outputs):
            if last.get(name, -1) <= place and name not in graph.outputs:
                alive.pop(name, None)
    return peak * devices
