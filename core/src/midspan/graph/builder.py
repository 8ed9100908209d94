"""Builds a graph, one method for each operation.

A model's builder says the algebra and the published names; this class keeps the
bookkeeping: unique names, shapes, weights, cache groups. It knows no model, no
device and no weight's content.

Names: a weight-bearing operation is named for its weights, ``q_proj`` inside
``scope("model.layers.0.self_attn")`` gives the node
``model.layers.0.self_attn.q_proj`` with the weight
``model.layers.0.self_attn.q_proj.weight`` (and ``.bias``). A node's only output
has the node's name; several outputs are ``node.label``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from midspan.errors import GraphError
from midspan.graph.inference import infer_outputs, input_value, input_values
from midspan.graph.validation import validate
from midspan.interface.cache import CacheGroup
from midspan.interface.graph import Attribute, Graph, Node, Value, Weight
from midspan.interface.operations import OPERATIONS

SAMPLE_OUTPUTS = ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs", "invalid")
"""Labels of the sample node's outputs, in the operation's order."""


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One attention layer's place in the cache, handed out by the builder.

    Attributes:
        group: the cache group's name.
        layer: index within the group.
        kv_heads: key/value heads.
        key_size: width of a key head.
        value_size: width of a value head.
        window: tokens that a token sees at most, itself included; None: all.
    """

    group: str
    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding, as the ``rotary`` operation takes it.

    Attributes:
        head_size: columns of a head.
        rotary_size: columns of a head that turn, from its start.
        inverse_frequencies: radians per position, one for each pair of columns.
        amplitude: factor of cosine and sine.
        interleaved: pairs are neighbours (2i, 2i+1) and not halves apart.
    """

    head_size: int
    rotary_size: int
    inverse_frequencies: tuple[float, ...]
    amplitude: float = 1.0
    interleaved: bool = False


class GraphBuilder:
    """Collects nodes until ``finish``.

    Args:
        architecture: the published class name, ``LlamaForCausalLM``.
    """

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self._values: dict[str, Value] = {}
        self._weights: dict[str, Weight] = {}
        self._nodes: dict[str, Node] = {}
        self._groups: dict[str, CacheGroup] = {}
        self._scopes: list[str] = []
        self._vocab_size: int | None = None
        self._hidden_size: int | None = None
        self._outputs: tuple[str, ...] = ()

    @property
    def token_ids(self) -> Value:
        """The step's token ids, int32 [T]."""
        return self._input("token_ids")

    @property
    def positions(self) -> Value:
        """The step's positions, int32 [T]."""
        return self._input("positions")

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything made inside; scopes nest. A pipeline may be cut where it changes."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def embedding(self, ids: Value, name: str, vocab_size: int, hidden_size: int, *, scale: float = 1.0) -> Value:
        """Rows of the table ``name.weight`` [vocab_size, hidden_size], times scale."""
        self._hidden_size = hidden_size
        weights = {"weight": self._weight(f"{self._full(name)}.weight", (vocab_size, hidden_size))}
        return self._single("embedding", name, (ids,), weights, {"scale": float(scale)})

    def linear(self, x: Value, name: str, out_features: int, *, bias: bool = False, split: str | None = None) -> Value:
        """``x @ weight.T + bias``; ``split`` is "columns", "rows" or None, see the operation."""
        weights = self._linear_weights(self._full(name), x, out_features, bias=bias)
        return self._single("linear", name, (x,), weights, {"split": split})

    def rms_norm(self, x: Value, name: str, epsilon: float, *, size: int | None = None, offset: float = 0.0) -> Value:
        """RMS norm over each run of ``size`` columns; None: over all columns."""
        weights = {"weight": self._weight(f"{self._full(name)}.weight", (self._columns(x) if size is None else size,))}
        return self._single("rms_norm", name, (x,), weights, {"epsilon": float(epsilon), "offset": float(offset)})

    def layer_norm(self, x: Value, name: str, epsilon: float, *, bias: bool = True) -> Value:
        """Layer norm over all columns."""
        full, size = self._full(name), self._columns(x)
        weights = {"weight": self._weight(f"{full}.weight", (size,))}
        if bias:
            weights["bias"] = self._weight(f"{full}.bias", (size,))
        return self._single("layer_norm", name, (x,), weights, {"epsilon": float(epsilon)})

    def add(self, a: Value, b: Value, *, name: str = "add") -> Value:
        """``a + b``."""
        return self._single("add", self._numbered(name), (a, b))

    def multiply(self, a: Value, b: Value, *, name: str = "multiply") -> Value:
        """``a * b``, element by element."""
        return self._single("multiply", self._numbered(name), (a, b))

    def scale(self, x: Value, factor: float, *, name: str = "scale") -> Value:
        """``x * factor``."""
        return self._single("scale", self._numbered(name), (x,), {}, {"factor": float(factor)})

    def activation(self, x: Value, function: str, *, name: str = "activation") -> Value:
        """``function(x)``; functions as the operation lists them."""
        return self._single("activation", self._numbered(name), (x,), {}, {"function": function})

    def gated(self, gate: Value, up: Value, function: str, *, name: str = "gated") -> Value:
        """``function(gate) * up``."""
        return self._single("gated", self._numbered(name), (gate, up), {}, {"function": function})

    def split(self, x: Value, sizes: Sequence[int], *, name: str = "split") -> tuple[Value, ...]:
        """Consecutive parts of the columns."""
        labels = tuple(str(index) for index in range(len(sizes)))
        return self._apply("split", self._numbered(name), (x,), {}, {"sizes": tuple(sizes)}, labels)

    def rotary(
        self, query: Value, key: Value, positions: Value, rotary: Rotary, *, name: str = "rotary"
    ) -> tuple[Value, Value]:
        """Query and key, turned by their positions."""
        attributes: dict[str, Attribute] = {
            "head_size": rotary.head_size,
            "rotary_size": rotary.rotary_size,
            "inverse_frequencies": rotary.inverse_frequencies,
            "amplitude": float(rotary.amplitude),
            "interleaved": rotary.interleaved,
        }
        inputs = (query, key, positions)
        turned = self._apply("rotary", self._numbered(name), inputs, {}, attributes, ("query", "key"))
        return turned[0], turned[1]

    def scale_rows(self, x: Value, factor: Value, *, function: str | None = None, name: str = "scale_rows") -> Value:
        """Each row of x times ``function(factor)``; factor is [N, 1]."""
        return self._single("scale_rows", self._numbered(name), (x, factor), {}, {"function": function})

    def route(
        self,
        logits: Value,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize: bool = False,
        bias: str | None = None,
        groups: int = 1,
        top_groups: int = 1,
        group_scoring: str = "largest",
        scale: float = 1.0,
        name: str = "route",
    ) -> tuple[Value, Value]:
        """Choose ``top_k`` experts for each row of router logits [N, experts], see the operation.

        Returns:
            Their numbers, int32 [N, top_k], and their shares, float32 [N, top_k].
        """
        weights = {} if bias is None else {"bias": self._weight(self._full(bias), (self._columns(logits),))}
        attributes: dict[str, Attribute] = {
            "top_k": top_k,
            "scoring": scoring,
            "normalize": normalize,
            "groups": groups,
            "top_groups": top_groups,
            "group_scoring": group_scoring,
            "scale": float(scale),
        }
        found = self._apply("route", self._numbered(name), (logits,), weights, attributes, ("ids", "shares"))
        return found[0], found[1]

    def experts(
        self,
        x: Value,
        chosen: tuple[Value, Value],
        name: str,
        *,
        count: int,
        inner: int,
        function: str,
        bias: bool = False,
        limit: float | None = None,
        slope: float = 1.0,
        up_offset: float = 0.0,
    ) -> Value:
        """What the chosen experts make of each row, summed by their shares.

        Args:
            x: [N, hidden].
            chosen: from ``route``.
            name: ``mlp.experts``: expert e's tensors are published as ``mlp.experts.{e}.gate_proj.weight`` and so on;
                ``midspan.weights.expert_tensors`` gives these names to what is published otherwise.
            count: experts.
            inner: width of an expert's middle.
            function: of the gate.
            bias: experts have biases.
            limit, slope, up_offset: see the operation.
        """
        full, hidden = self._full(name), self._columns(x)
        weights = {
            "gate_up": self._expert_weight(f"{full}.gate_up", (count, 2 * inner, hidden), ("gate_proj", "up_proj")),
            "down": self._expert_weight(f"{full}.down", (count, hidden, inner), ("down_proj",)),
        }
        if bias:
            sources = ("gate_proj", "up_proj")
            weights["gate_up_bias"] = self._expert_weight(f"{full}.gate_up_bias", (count, 2 * inner), sources, "bias")
            weights["down_bias"] = self._expert_weight(f"{full}.down_bias", (count, hidden), ("down_proj",), "bias")
        attributes: dict[str, Attribute] = {
            "function": function,
            "limit": limit,
            "slope": float(slope),
            "up_offset": float(up_offset),
        }
        return self._single("experts", name, (x, *chosen), weights, attributes)

    def full_cache(self, *, kv_heads: int, key_size: int, value_size: int | None = None) -> CacheLayer:
        """The next layer of the group that keeps all tokens."""
        return self._cache("full", None, kv_heads, key_size, value_size)

    def window_cache(self, window: int, *, kv_heads: int, key_size: int, value_size: int | None = None) -> CacheLayer:
        """The next layer of the group that keeps the last ``window`` tokens."""
        return self._cache(f"window.{window}", window, kv_heads, key_size, value_size)

    def attention(
        self,
        query: Value,
        key: Value,
        value: Value,
        *,
        cache: CacheLayer,
        heads: int,
        scale: float,
        soft_cap: float | None = None,
        alibi_slopes: tuple[float, ...] | None = None,
        sinks: str | None = None,
        name: str = "attention",
    ) -> Value:
        """Attention over the request's cached tokens.

        Args:
            query: [T, heads * key_size].
            key: [T, kv_heads * key_size].
            value: [T, kv_heads * value_size].
            cache: from ``full_cache`` or ``window_cache``; used by one attention only.
            heads: query heads.
            scale: factor of the scores.
            soft_cap: caps the scores softly at this size.
            alibi_slopes: one for each query head.
            sinks: published name of a weight [heads], one more score for each head.
            name: of the node.

        Returns:
            [T, heads * value_size].
        """
        tables = ("query_starts", "context_lengths", f"block_tables.{cache.group}", f"slots.{cache.group}")
        inputs = (query, key, value, *(self._input(table) for table in tables))
        weights = {} if sinks is None else {"sinks": self._weight(self._full(sinks), (heads,))}
        attributes: dict[str, Attribute] = {
            "group": cache.group,
            "layer": cache.layer,
            "heads": heads,
            "kv_heads": cache.kv_heads,
            "key_size": cache.key_size,
            "value_size": cache.value_size,
            "scale": float(scale),
            "window": cache.window,
            "soft_cap": None if soft_cap is None else float(soft_cap),
            "alibi_slopes": alibi_slopes,
        }
        return self._single("attention", self._numbered(name), inputs, weights, attributes)

    def rows_to_sample(self, x: Value, *, name: str = "sampled_rows") -> Value:
        """The rows of x for which a token is wanted, [S, ...]."""
        return self._single("select_rows", self._numbered(name), (x, self._input("rows_to_sample")))

    def logits(
        self,
        x: Value,
        name: str,
        vocab_size: int,
        *,
        tied_to: str | None = None,
        bias: bool = False,
        scale: float = 1.0,
        soft_cap: float | None = None,
    ) -> Value:
        """Scores of all token ids, float32; ``tied_to`` names the embedding whose table is used."""
        self._vocab_size = vocab_size
        weights = self._linear_weights(self._full(name) if tied_to is None else tied_to, x, vocab_size, bias=bias)
        attributes = {"scale": float(scale), "soft_cap": None if soft_cap is None else float(soft_cap)}
        return self._single("logits", name, (x,), weights, attributes)

    def sample(self, logits: Value, *, name: str = "sample") -> tuple[Value, ...]:
        """Choose tokens; the results become the graph's outputs. Returns them in ``SAMPLE_OUTPUTS`` order."""
        chosen = self._apply("sample", name, (logits, self._input("sampling")), {}, {}, SAMPLE_OUTPUTS)
        self._outputs = tuple(value.name for value in chosen)
        return chosen

    def finish(self, *, max_position: int, name: str | None = None) -> Graph:
        """The graph, validated.

        Args:
            max_position: positions for which the model was made.
            name: for people; None: architecture and number of weights.

        Raises:
            GraphError: something is missing or does not fit.
        """
        if self._hidden_size is None or self._vocab_size is None or not self._outputs:
            raise GraphError("a graph needs an embedding, logits and a sample node")
        groups = tuple(self._groups.values())
        inputs = input_values(groups)
        produced = {output: self._values[output] for node in self._nodes.values() for output in node.outputs}
        graph = Graph(
            name=name or f"{self._architecture} {_size(self._weights)}",
            architecture=self._architecture,
            inputs=tuple(value.name for value in inputs),
            outputs=self._outputs,
            values={**{value.name: value for value in inputs}, **produced},
            weights=dict(self._weights),
            nodes=tuple(self._nodes.values()),
            cache=groups,
            vocab_size=self._vocab_size,
            hidden_size=self._hidden_size,
            max_position=max_position,
        )
        validate(graph)
        return graph

    def _input(self, name: str) -> Value:
        return self._values.setdefault(name, input_value(name))

    def _full(self, name: str) -> str:
        return ".".join((*self._scopes, name))

    def _numbered(self, name: str) -> str:
        count, candidate = 1, name
        while self._full(candidate) in self._nodes:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def _columns(self, x: Value) -> int:
        size = x.shape[-1]
        if not isinstance(size, int):
            raise GraphError(f"value '{x.name}' has a symbolic last size, {x.shape}")
        return size

    def _weight(self, name: str, shape: tuple[int, ...]) -> str:
        known = self._weights.setdefault(name, Weight(name=name, shape=shape))
        if known.shape != shape:
            raise GraphError(f"weight '{name}' is used with shapes {known.shape} and {shape}")
        return name

    def _expert_weight(self, name: str, shape: tuple[int, ...], parts: tuple[str, ...], kind: str = "weight") -> str:
        """A weight of all experts, put together from each expert's tensors."""
        prefix = name.rpartition(".")[0]
        sources = tuple(f"{prefix}.{expert}.{part}.{kind}" for expert in range(shape[0]) for part in parts)
        self._weights[name] = Weight(name=name, shape=shape, sources=sources)
        return name

    def _linear_weights(self, full: str, x: Value, out_features: int, *, bias: bool) -> dict[str, str]:
        weights = {"weight": self._weight(f"{full}.weight", (out_features, self._columns(x)))}
        if bias:
            weights["bias"] = self._weight(f"{full}.bias", (out_features,))
        return weights

    def _cache(self, name: str, window: int | None, kv_heads: int, key_size: int, value_size: int | None) -> CacheLayer:
        value_size = key_size if value_size is None else value_size
        wanted = CacheGroup(
            name=name, layers=0, kv_heads=kv_heads, key_size=key_size, value_size=value_size, window=window
        )
        group = self._groups.get(name, wanted)
        if replace(group, layers=0) != wanted:
            raise GraphError(f"layers of cache group '{name}' have different heads: {group} and {wanted}")
        self._groups[name] = replace(group, layers=group.layers + 1)
        return CacheLayer(
            group=name,
            layer=group.layers,
            kv_heads=kv_heads,
            key_size=key_size,
            value_size=value_size,
            window=window,
        )

    def _single(
        self,
        op: str,
        name: str,
        inputs: tuple[Value, ...],
        weights: Mapping[str, str] | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> Value:
        return self._apply(op, name, inputs, weights or {}, attributes or {}, ())[0]

    def _apply(
        self,
        op: str,
        name: str,
        inputs: tuple[Value, ...],
        weights: Mapping[str, str],
        attributes: Mapping[str, Attribute],
        labels: tuple[str, ...],
    ) -> tuple[Value, ...]:
        full = self._full(name)
        node = Node(
            name=full,
            op=op,
            inputs=tuple(value.name for value in inputs),
            outputs=tuple(f"{full}.{label}" for label in labels) or (full,),
            weights=dict(weights),
            attributes={**OPERATIONS[op].attributes, **attributes},
            scope=".".join(self._scopes),
        )
        if full in self._nodes:
            raise GraphError("a node of this name exists already", node=full)
        outputs = infer_outputs(node, self._values, self._weights)
        for value in outputs:
            if value.name in self._values:
                raise GraphError(f"a value '{value.name}' exists already", node=full)
        self._nodes[full] = node
        self._values.update({value.name: value for value in outputs})
        return outputs


def _size(weights: Mapping[str, Weight]) -> str:
    count = 0
    for weight in weights.values():
        numbers = 1
        for size in weight.shape:
            numbers *= size
        count += numbers
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)
