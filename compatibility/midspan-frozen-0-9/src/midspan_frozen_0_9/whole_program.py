"""Walks a graph node by node, with the code of this package for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import GraphError, MidspanError
from midspan.interface import (
    Batch,
    Cache,
    FinishedStep,
    Graph,
    Logprobs,
    NodePlacement,
    Placement,
    SamplingBatch,
    StepResult,
)
from midspan_frozen_0_9.whole_cache import WholeCache
from midspan_frozen_0_9.whole_operations import OPERATIONS, Call


class WholeProgram:
    """A compiled graph.

    Args:
        graph: every operation of it is known.
        weights: content by name, float32.
        working_bytes: what the largest step may take beside them.
        device: the device's id.
    """

    def __init__(
        self, graph: Graph, weights: Mapping[str, NDArray[np.float32]], working_bytes: int, device: str
    ) -> None:
        nodes = tuple(NodePlacement(node=n.name, op=n.op, kernel="frozen", fallback=False) for n in graph.nodes)
        self.placement = Placement(device=device, nodes=nodes)
        self._graph = graph
        self._weights = dict(weights)
        self._bytes = working_bytes + sum(array.nbytes for array in weights.values())
        self._closed = False

    def run(self, batch: Batch, cache: Cache) -> FinishedStep:
        """Execute one step."""
        if self._graph.nodes[-1].op != "sample" or self._graph.nodes[-1].outputs != self._graph.outputs:
            raise GraphError("this graph does not end in sampling; use evaluate()")
        inputs = {name: batch.graph_input(name) for name in self._graph.inputs}
        ids, chosen, ranks, top_ids, top, invalid = self._walk(inputs, cache)
        logprobs = None
        if batch.sampling.num_logprobs is not None:
            logprobs = Logprobs(chosen=chosen, ranks=ranks, top_token_ids=top_ids, top=top)
        result = StepResult(token_ids=ids, logprobs=logprobs, invalid=invalid if invalid.any() else None)
        return FinishedStep(step_result=result)

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Execute the graph on any values."""
        return tuple(self._walk(inputs, cache))

    def memory_bytes(self) -> int:
        """Bytes of weights and of the largest step."""
        return self._bytes

    def close(self) -> None:
        """Let go of the weights."""
        self._weights, self._bytes, self._closed = {}, 0, True

    def _walk(self, inputs: Mapping[str, Any], cache: Cache | None) -> list[Any]:
        if self._closed:
            raise MidspanError("The program was closed.")
        values = dict(inputs)
        own = cache if isinstance(cache, WholeCache) else None
        with np.errstate(all="ignore"):
            for node in self._graph.nodes:
                call = Call(
                    inputs=[values[name] for name in node.inputs],
                    weights={role: self._weights[name] for role, name in node.weights.items()},
                    attributes=node.attributes,
                    cache=own,
                )
                values.update(zip(node.outputs, OPERATIONS[node.op](call), strict=True))
        return [values[name] for name in self._graph.outputs]
