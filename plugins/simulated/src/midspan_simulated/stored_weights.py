"""Bytes that a weight takes on a device, by the format in which it is stored.

Knows shapes and formats, and no content. The packed formats here are for planning: they are
sizes, not layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from midspan.interface.graph import Graph, Weight
from midspan.runtimes.reference.element_types import element_type

STORED_FORMATS: Mapping[str, float] = {"int8": 1.0 + 2 / 128, "fp8": 1.0, "int4": 0.5 + 2 / 128}
"""Bytes per number. The integer formats have a 16-bit scale for each 128 numbers; the one scale
per tensor that fp8 usually has is nothing beside its matrix."""


def stored_bytes(graph: Graph, dtype: str, stored: str | None) -> dict[str, int]:
    """Bytes of every weight of a graph.

    Args:
        graph: the model.
        dtype: activation type; weights are kept in it where nothing else is said.
        stored: a key of ``STORED_FORMATS`` for matrices of linear nodes and of experts, None for the activation
            type. Embeddings, logits, norms and biases keep the activation type, as published quantizations mostly do.

    Returns:
        Weight name -> bytes.
    """
    packed: set[str] = set()
    if stored is not None:
        packed = {node.weights["weight"] for node in graph.nodes if node.op == "linear"}
        packed |= {node.weights[role] for node in graph.nodes if node.op == "experts" for role in ("gate_up", "down")}
        packed -= {
            name for node in graph.nodes if node.op not in ("linear", "experts") for name in node.weights.values()
        }
    return {name: _bytes(weight, dtype, stored if name in packed else None) for name, weight in graph.weights.items()}


def _bytes(weight: Weight, dtype: str, stored: str | None) -> int:
    each = float(element_type(dtype).itemsize) if stored is None else STORED_FORMATS[stored]
    return math.ceil(math.prod(weight.shape) * each)
