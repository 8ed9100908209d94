"""One operation on given inputs: a graph of one node, and what must come out.

For holding a device's kernels against the definitions. Numpy only; knows no
device and no runtime. Inputs are such that float32, bfloat16 and float16 all
hold them exactly, or all round them alike, so that only what is computed can differ.

Invariants: expected outputs come from the reference in the same element type;
cache slots that no request wrote hold NaN, so that a kernel that lets them touch
a result is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import SamplingBatch
from midspan.interface.cache import CacheGroup, CacheLayout
from midspan.interface.graph import ACTIVATION, Attribute, Dim, Graph, Node, Value, Weight
from midspan.interface.operations import OPERATIONS
from midspan.interface.weights import DENSE, PackedTensor
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.element_types import element_type
from midspan.runtimes.reference.operations import REFERENCE
from midspan.runtimes.reference.packed_weights import READABLE, weight_operand

CaseInput = Union[NDArray[Any], SamplingBatch]

NODE = "node"
"""Name of the node in every case's graph."""

LEADING: Mapping[str, Dim] = {
    "query_starts": "B+1",
    "context_lengths": "B",
    "block_table": "B",
    "rows": "S",
    "logits": "S",
}
"""First size of an input by its role; "T" for all others."""


WIDE_ROLES = frozenset({("sample", "logits"), ("experts", "expert_weights")})
"""(operation, input) whose numbers are float32 whatever the activation type."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheContent:
    """A cache before the step.

    Attributes:
        group: the only group.
        block_size: tokens per block.
        blocks: blocks allocated, the padding block included.
        data: float32 in the canonical layout of all blocks; NaN where nothing was written.
    """

    group: CacheGroup
    block_size: int
    blocks: int
    data: NDArray[np.float32]

    def layout(self, dtype: str) -> CacheLayout:
        """The layout to allocate, with elements of a type."""
        return CacheLayout(groups=(self.group,), block_size=self.block_size, dtype=dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class OperationCase:
    """An operation, its inputs, weights and attributes.

    Attributes:
        name: unique among the cases: the operation and what is special.
        op: the operation.
        inputs: one for each input role. Activations and weights are float32 arrays and are
            cast to the activation type; integers are int32.
        weights: role -> float32 array.
        attributes: those that are not the default.
        cache: for attention.
        packed: role -> the weight as it is loaded, where that is not dense; its numbers stand
            in ``weights``.
    """

    name: str
    op: str
    inputs: tuple[CaseInput, ...]
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    cache: CacheContent | None = None
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def context(self) -> int:
        """Tokens of the longest request that the case stands for; 0 where it says nothing of that."""
        roles = OPERATIONS[self.op].inputs
        lengths = [0]
        for role, more in (("context_lengths", 0), ("positions", 1)):
            if role in roles:
                lengths += [int(length) + more for length in np.asarray(self.inputs[roles.index(role)])]
        return max(lengths)

    def all_attributes(self) -> dict[str, Attribute]:
        """The node's attributes, defaults included."""
        return {**OPERATIONS[self.op].attributes, **self.attributes}

    def graph(self) -> Graph:
        """One node; its inputs are the graph's, named for the operation's roles."""
        operation = OPERATIONS[self.op]
        values = {role: self._value(role, array) for role, array in zip(operation.inputs, self.inputs, strict=True)}
        weights = {role: Weight(name=role, shape=array.shape) for role, array in self.weights.items()}
        attributes = self.all_attributes()
        shapes = operation.infer(list(values.values()), weights, attributes)
        outputs = {
            f"output.{place}": Value(name=f"output.{place}", shape=tuple(shape), dtype=dtype)
            for place, (shape, dtype) in enumerate(shapes)
        }
        node = Node(
            name=NODE,
            op=self.op,
            inputs=operation.inputs,
            outputs=tuple(outputs),
            weights={role: role for role in weights},
            attributes=attributes,
        )
        return Graph(
            name=self.name,
            architecture="one node",
            inputs=operation.inputs,
            outputs=tuple(outputs),
            values={**values, **outputs},
            weights=weights,
            nodes=(node,),
            cache=() if self.cache is None else (self.cache.group,),
            vocab_size=1,
            hidden_size=1,
            max_position=1 << 17,
        )

    def load(self, weight: Weight) -> PackedTensor:
        """The content of a weight of the graph: a case is its own ``WeightSource``."""
        if weight.name in self.packed:
            return self.packed[weight.name]
        array = self.weights[weight.name].view()
        array.flags.writeable = False  # as those of a mapped file
        return PackedTensor(name=weight.name, shape=array.shape, format=DENSE, parts={"data": array})

    def typed_inputs(self, dtype: str) -> tuple[CaseInput, ...]:
        """The inputs, activations cast to a type (``ml_dtypes.bfloat16`` for bfloat16)."""
        return tuple(
            value.astype(element_type(dtype))
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and (self.op, role) not in WIDE_ROLES
            else value
            for role, value in zip(OPERATIONS[self.op].inputs, self.inputs, strict=True)
        )

    def expected(self, dtype: str, cache_dtype: str) -> tuple[tuple[NDArray[Any], ...], NDArray[np.float32] | None]:
        """What the definition gives.

        Returns:
            The outputs; and the whole cache after the step in the canonical layout, or None.
        """
        keywords: dict[str, Any] = {**self.all_attributes()}
        keywords.update({role: array.astype(element_type(dtype)) for role, array in self.weights.items()})
        # Some formats mean more than their numbers.
        for role, tensor in self.packed.items():
            if tensor.format in READABLE:
                keywords[role] = weight_operand(tensor, dtype, self.op)
        inputs: list[Any] = list(self.typed_inputs(dtype))
        cache = None
        if self.cache is not None:
            cache = ReferenceCache(self.cache.layout(cache_dtype), (self.cache.blocks,))
            cache.write(self.cache.group.name, range(self.cache.blocks), self.cache.data)
            inputs.append(cache)
        with np.errstate(all="ignore"):
            result = REFERENCE[self.op](*inputs, **keywords)
        outputs = result if isinstance(result, tuple) else (result,)
        if cache is None or self.cache is None:
            return outputs, None
        return outputs, cache.read(self.cache.group.name, range(self.cache.blocks))

    def _value(self, role: str, array: CaseInput) -> Value:
        if isinstance(array, SamplingBatch):
            return Value(name=role, shape=("S",), dtype="sampling")
        leading: Dim = LEADING.get(role, "T")
        rest: tuple[Dim, ...] = array.shape[1:]
        if role == "block_table" and self.cache is not None:
            rest = (f"M.{self.cache.group.name}",)
        shape = (leading, *rest)
        dtype = "int32" if array.dtype == np.int32 else "float32" if (self.op, role) in WIDE_ROLES else ACTIVATION
        return Value(name=role, shape=shape, dtype=dtype)
