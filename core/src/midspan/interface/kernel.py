"""Kernels: how a runtime is told what a device can do with a node.

A device that uses one of the shipped runtimes gives it a table of kernels. For
each node the runtime asks every kernel of that operation whether it supports
the site, and takes the willing one with the highest priority; the choice is
made once, at compile, and is kept in a ``Placement`` for people to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from midspan.interface.graph import Node, Value
from midspan.interface.weights import PackedTensor


@dataclass(frozen=True)
class Yes:
    """The kernel serves this site."""


@dataclass(frozen=True)
class No:
    """The kernel does not serve this site.

    Attributes:
        reason: why, for a person: "head_size 80 is not a multiple of 32".
    """

    reason: str


Support = Union[Yes, No]
"""What a kernel answers when it is asked whether it serves a site."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelSite:
    """A node, and all that is known about it when a kernel is chosen.

    Attributes:
        node: the node.
        inputs: its input values (shapes may hold symbols).
        outputs: its output values.
        weights: role -> the weight as it will be given, still packed; an optional weight that
            the node does not have is not in it. A dense one comes in the checkpoint's type and
            is rounded to ``dtype`` before anything is computed with it.
        dtype: what ``"activation"`` stands for in this program.
        cache_dtype: element type of the KV cache.
        block_size: tokens per cache block.
        max_tokens, max_requests, max_context, max_sampled_rows: the program's ``Bounds``, for a kernel
            of fixed shapes; 0 where they are not known.
    """

    node: Node
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: Mapping[str, PackedTensor]
    dtype: str
    cache_dtype: str
    block_size: int
    max_tokens: int = 0
    max_requests: int = 0
    max_context: int = 0
    max_sampled_rows: int = 0


def always(site: KernelSite) -> Support:
    """Support every site of the operation."""
    return Yes()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to execute one operation.

    Attributes:
        name: unique among the kernels of the operation; shown to people.
        op: the operation.
        prepare: called once per node at compile, with the site. Packs weights, reads
            attributes and returns the function that is called in each step with the
            node's input values, positionally, and that returns its output: the array itself
            where the operation has one, a tuple in the operation's order where it has several.
            An attention kernel's function gets, after its inputs, the cache as the device made
            it. No function may write into its inputs, which other nodes read too; an output may
            share memory with them. An activation is returned in the program's type: the function
            rounds, once, at its end. Rows come first in every array, and there may be none.
        supports: whether it can serve a site; a refusal says why.
        priority: the highest willing one is taken. Portable kernels have 0.
    """

    name: str
    op: str
    prepare: Callable[[KernelSite], Callable[..., Any]]
    supports: Callable[[KernelSite], Support] = always
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class NodePlacement:
    """What was decided for one node.

    Attributes:
        node: its name.
        op: its operation.
        kernel: the chosen kernel's name.
        fallback: True when the kernel is the runtime's portable one although the
            device's table has kernels for this operation, or has none.
        refused: (kernel, reason) for each that was asked and not taken.
        others: kernels of the operation that were not asked, since the taken one comes first,
            in the order in which they would have been.
    """

    node: str
    op: str
    kernel: str
    fallback: bool
    refused: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which kernel serves each node of a program.

    Attributes:
        device: the device's id.
        nodes: in execution order.
    """

    device: str
    nodes: tuple[NodePlacement, ...] = field(default=())
