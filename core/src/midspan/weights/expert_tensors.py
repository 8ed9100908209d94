"""One set of names for experts' tensors, however they are published.

Expert e of a layer has ``<layer>.mlp.experts.{e}.gate_proj.weight``, ``up_proj`` and ``down_proj``, each ``[out, in]``.
Published are also: other words for these (Mixtral's ``w1``, ``w3`` and ``w2`` in ``block_sparse_moe``), all experts in
one tensor with gate above up (Granite, and what newer versions of transformers write), the same with inputs before
outputs and gate and up taking turns (gpt-oss), and experts below each other (DBRX). Tensors of several experts are cut
into views; nothing is read here.

Knows names and layouts, and nothing about files or devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from numpy.typing import NDArray

from midspan.weights.stored_tensor import StoredTensor

Cut = Callable[[NDArray[Any]], NDArray[Any]]

_WORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.block_sparse_moe\.input_linear\.weight$"), ".mlp.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear\.weight$"), ".mlp.experts.down_proj"),
    (re.compile(r"\.block_sparse_moe\.router\.layer\."), ".mlp.router."),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
)
"""Other words of published names, applied in this order."""

_TOGETHER = re.compile(r"(.+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?")
"""All experts in one tensor."""

_STACKED = re.compile(r"(.+)\.experts\.mlp\.(w1|v1|w2)")
"""DBRX: experts below each other, ``[experts * inner, hidden]`` each."""

_STACKED_PARTS = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}


def with_expert_names(tensors: Mapping[str, StoredTensor], *, stacked: int = 1) -> dict[str, StoredTensor]:
    """The same tensors, those of experts under the names above, the others as they are.

    Args:
        tensors: published name -> tensor.
        stacked: experts of a layer, where a tensor has them below each other.
    """
    renamed = {_in_our_words(name): tensor for name, tensor in tensors.items()}
    found: dict[str, StoredTensor] = {}
    for name, tensor in renamed.items():
        for part in _parts(name, tensor, renamed, stacked):
            found[part.name] = part
    return found


def _in_our_words(name: str) -> str:
    for pattern, word in _WORDS:
        name = pattern.sub(word, name)
    return name


def _parts(name: str, tensor: StoredTensor, others: Mapping[str, StoredTensor], stacked: int) -> Iterator[StoredTensor]:
    together, below = _TOGETHER.fullmatch(name), _STACKED.fullmatch(name)
    if below is not None and len(tensor.shape) == 2 and tensor.shape[0] % stacked == 0:
        yield from _below_each_other(below[1], _STACKED_PARTS[below[2]], tensor, stacked)
    elif together is None or len(tensor.shape) != (2 if together[3] else 3):
        yield replace(tensor, name=name)
    elif f"{together[1]}.gate_up_proj_bias" in others:
        yield from _taking_turns(together[1], together[2], bool(together[3]), tensor)
    else:
        yield from _one_above_the_other(together[1], together[2], "bias" if together[3] else "weight", tensor)


def _one_above_the_other(prefix: str, part: str, kind: str, tensor: StoredTensor) -> Iterator[StoredTensor]:
    """``[experts, out, in]``, or biases ``[experts, out]``, gate's outputs before up's."""
    experts, outputs, *inputs = tensor.shape
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    size = outputs // len(names)
    for expert in range(experts):
        for place, name in enumerate(names):
            cut = _Rows(experts=experts, expert=expert, outputs=outputs, begin=place * size, end=(place + 1) * size)
            yield _view(tensor, f"{prefix}.{expert}.{name}.{kind}", (size, *inputs), cut)


def _taking_turns(prefix: str, part: str, bias: bool, tensor: StoredTensor) -> Iterator[StoredTensor]:
    """``[experts, in, out]``, or biases ``[experts, out]``, where gate has the even outputs and up the odd ones."""
    experts, outputs = tensor.shape[0], tensor.shape[-1]
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    size, kind = outputs // len(names), "bias" if bias else "weight"
    shape = (size,) if bias else (size, tensor.shape[1])
    for expert in range(experts):
        for place, name in enumerate(names):
            cut = _Outputs(expert=expert, begin=place, step=len(names))
            yield _view(tensor, f"{prefix}.{expert}.{name}.{kind}", shape, cut)


def _below_each_other(prefix: str, part: str, tensor: StoredTensor, experts: int) -> Iterator[StoredTensor]:
    rows, hidden = tensor.shape
    inner = rows // experts
    turned = part == "down_proj"
    for expert in range(experts):
        cut = _Rows(experts=experts, expert=expert, outputs=inner, begin=0, end=inner, turned=turned)
        shape = (hidden, inner) if turned else (inner, hidden)
        yield _view(tensor, f"{prefix}.experts.{expert}.{part}.weight", shape, cut)


def _view(tensor: StoredTensor, name: str, shape: tuple[int, ...], cut: Cut) -> StoredTensor:
    share = tensor.nbytes * prod(shape) // prod(tensor.shape)
    return replace(tensor, name=name, shape=shape, nbytes=share, read=_Reader(whole=tensor, cut=cut))


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Some rows of one expert, of numbers or of packed blocks."""

    experts: int
    expert: int
    outputs: int
    begin: int
    end: int
    turned: bool = False

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        columns = array.size // (self.experts * self.outputs)
        rows = array.reshape(self.experts, self.outputs, columns)[self.expert, self.begin : self.end]
        if array.ndim == 2 and self.experts == array.shape[0] and self.outputs == array.shape[1]:
            return rows[:, 0]  # biases
        return rows.T if self.turned else rows


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """Some of the last size of one expert, as rows."""

    expert: int
    begin: int
    step: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        chosen: NDArray[Any] = array[self.expert][..., self.begin :: self.step].T
        return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reader:
    """Gives a view of a tensor's parts."""

    whole: StoredTensor
    cut: Cut

    def __call__(self) -> Mapping[str, NDArray[Any]]:
        return {role: self.cut(array) for role, array in self.whole.read().items()}
