"""The graph: a model as plain data.

A graph is a straight list of nodes over named values. It knows no device, no
array library and no weight's content: only shapes, names and attributes.

Invariants (checked by ``midspan.graph.validation``):

* every value has one producer: a graph input or one node's output;
* nodes stand in an order in which every input is produced before it is read;
* a node's operation is listed in ``interface.operations`` and its inputs,
  weights and attributes fit that operation's signature;
* names of nodes, values and weights are unique.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Union

from midspan.interface.cache import CacheGroup

Dim = Union[int, str]
"""A size: a number, or a symbol that each step fills in.

Symbols: ``"T"`` tokens of the step, ``"B"`` requests, ``"B+1"``, ``"S"`` rows
to sample, ``"L"`` wanted top logprobs, ``"M.<group>"`` blocks per request in a
cache group.
"""

Attribute = Union[None, bool, int, float, str, tuple[int, ...], tuple[float, ...], tuple[str, ...]]
"""What a node may carry besides values: JSON-like scalars and flat tuples."""

ACTIVATION = "activation"
"""The dtype of a value whose precision is chosen at compile time (``Bounds.dtype``)."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor that flows between nodes.

    Attributes:
        name: unique in the graph.
        shape: sizes, some of them symbols.
        dtype: ``"activation"``, ``"float32"``, ``"int32"``, or ``"sampling"``
            for the step's sampling numbers, which are a record and no tensor.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: str = ACTIVATION


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter by name; its content is asked of a ``WeightSource`` at compile.

    Attributes:
        name: unique in the graph; the published name when it is one tensor.
        shape: all sizes known; linear weights are ``[out, in]``, experts' ``[experts, out, in]``.
        sources: published names whose rows are put one below the other to make
            this weight; where it has more sizes than they, the rows fill its leading sizes in order,
            as those of ``[experts, out, in]`` do. Empty means: the published tensor of this name.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """One application of an operation.

    Attributes:
        name: unique, readable: the scope and what it does, ``model.layers.0.self_attn.q_proj``.
        op: a key of ``interface.operations.OPERATIONS``.
        inputs: names of values, in the order of the operation's signature.
        outputs: names of the values that it produces.
        weights: the operation's weight roles -> names of graph weights; in no order, so a weight is
            found by its role.
        attributes: the operation's attributes, all of them, defaults included.
        scope: the dotted prefix under which the builder made it; a pipeline may be
            cut where it changes.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    scope: str = ""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A whole model, from token ids to sampled tokens.

    Attributes:
        name: for people: the architecture and size.
        architecture: the published class name, ``LlamaForCausalLM``.
        inputs: the values that a ``Batch`` supplies, see ``interface.batch.graph_input_names``.
        outputs: names of the values that the program returns.
        values: every value by name, inputs included.
        weights: every weight by name.
        nodes: in execution order.
        cache: the cache groups that attention nodes name.
        vocab_size: number of token ids that the logits cover.
        hidden_size: width of the residual stream.
        max_position: positions for which the model was made.
    """

    name: str
    architecture: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Value]
    weights: Mapping[str, Weight]
    nodes: tuple[Node, ...]
    cache: tuple[CacheGroup, ...]
    vocab_size: int
    hidden_size: int
    max_position: int
