"""The operations of the graph language: signatures and shapes.

Each entry states inputs, weights and attributes, and how output shapes follow
from them. What an operation computes is defined, executable, by the numpy
function of the same name in ``midspan.runtimes.reference.operations``; the text
here says it in words. N stands for any leading size (T or S).

Rules for all: arithmetic is done in float32 or better whatever the activation
type, the output is rounded once; rows are independent of each other except in
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from midspan.errors import GraphError
from midspan.interface.graph import ACTIVATION, Attribute, Dim, Value, Weight

Shape = tuple[Dim, ...]
"""Sizes of a value, some of them symbols."""

Infer = Callable[[Sequence[Value], Mapping[str, Weight], Mapping[str, Attribute]], Sequence[tuple[Shape, str]]]
"""(inputs, weights by role, attributes) -> (shape, dtype) of each output."""

REQUIRED = "<required>"
"""Marks an attribute that has no default."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """The signature of one operation.

    Attributes:
        name: what nodes say in ``op``.
        inputs: roles of the input values, in order.
        weights: roles of weights that must be given.
        optional_weights: roles of weights that may be given.
        attributes: name -> default, or ``REQUIRED``.
        infer: (inputs, weights, attributes) -> (shape, dtype) of each output; raises
            ``GraphError`` when shapes do not fit.
        row_wise: output row i depends on input row i alone, so that dropping rows
            before it or after it is the same.
        refusable: a device may refuse every node of it, as one does that was made before the operation;
            models that need it do not run there.
        doc: what it computes.
    """

    name: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    optional_weights: tuple[str, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    infer: Infer
    row_wise: bool = True
    refusable: bool = False
    doc: str = ""


OPERATIONS: dict[str, Operation] = {}
"""Every operation by name. Filled in this module only."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def _last(value: Value) -> int:
    size = value.shape[-1]
    if not isinstance(size, int):
        raise GraphError(f"value '{value.name}' has a symbolic last size, {value.shape}")
    return size


def _integer(attributes: Mapping[str, Attribute], name: str) -> int:
    value = attributes[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise GraphError(f"attribute '{name}' must be an integer, not {value!r}")
    return value


def _integers(attributes: Mapping[str, Attribute], name: str) -> tuple[int, ...]:
    value = attributes[name]
    if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
        raise GraphError(f"attribute '{name}' must be a tuple of integers, not {value!r}")
    return tuple(int(item) for item in value)


def _register(
    name: str,
    inputs: str,
    infer: Infer,
    *,
    weights: str = "",
    optional_weights: str = "",
    row_wise: bool = True,
    refusable: bool = False,
    doc: str,
    **attributes: Attribute,
) -> None:
    OPERATIONS[name] = Operation(
        name=name,
        inputs=tuple(inputs.split()),
        weights=tuple(weights.split()),
        optional_weights=tuple(optional_weights.split()),
        attributes=attributes,
        infer=infer,
        row_wise=row_wise,
        refusable=refusable,
        doc=doc,
    )


def _embedding(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    _require(inputs[0].dtype == "int32", "token ids must be int32")
    _require(len(weights["weight"].shape) == 2, "the table must be [vocabulary, hidden]")
    return [((*inputs[0].shape, weights["weight"].shape[1]), ACTIVATION)]


def _linear_shape(inputs: Sequence[Value], weights: Mapping[str, Weight]) -> Shape:
    shape = weights["weight"].shape
    _require(len(shape) == 2, f"the weight must be [out, in], not {shape}")
    _require(
        _last(inputs[0]) == shape[1],
        f"input has {_last(inputs[0])} columns, weight '{weights['weight'].name}' takes {shape[1]}",
    )
    if "bias" in weights:
        bias = weights["bias"]
        _require(bias.shape == (shape[0],), f"bias '{bias.name}' must have shape ({shape[0]},), not {bias.shape}")
    return (*inputs[0].shape[:-1], shape[0])


def _linear(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    _require(attributes["split"] in (None, "columns", "rows"), "split must be 'columns', 'rows' or None")
    return [(_linear_shape(inputs, weights), ACTIVATION)]


def _logits(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    return [(_linear_shape(inputs, weights), "float32")]


def _norm(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    size = weights["weight"].shape[-1]
    _require(_last(inputs[0]) % size == 0, f"input has {_last(inputs[0])} columns, no multiple of the weight's {size}")
    return [(inputs[0].shape, ACTIVATION)]


def _same_shape(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    for other in inputs[1:]:
        _require(other.shape == inputs[0].shape, f"shapes differ: {inputs[0].shape} and {other.shape}")
    return [(inputs[0].shape, inputs[0].dtype)]


def _add_rms_norm(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    _require(inputs[0].shape == inputs[1].shape, f"shapes differ: {inputs[0].shape} and {inputs[1].shape}")
    return [*_norm(inputs[:1], weights, attributes), (inputs[0].shape, ACTIVATION)]


def _gated_pair(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    _require(_last(inputs[0]) % 2 == 0, f"input has an odd number of columns, {_last(inputs[0])}")
    return [((*inputs[0].shape[:-1], _last(inputs[0]) // 2), inputs[0].dtype)]


def _split(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    sizes = _integers(attributes, "sizes")
    _require(sum(sizes) == _last(inputs[0]), f"sizes {sizes} do not add up to {_last(inputs[0])} columns")
    return [((*inputs[0].shape[:-1], size), inputs[0].dtype) for size in sizes]


def _rotary(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    head_size, rotary_size = _integer(attributes, "head_size"), _integer(attributes, "rotary_size")
    frequencies = attributes["inverse_frequencies"]
    _require(rotary_size % 2 == 0 and rotary_size <= head_size, f"rotary_size {rotary_size} does not fit {head_size}")
    _require(
        isinstance(frequencies, tuple) and len(frequencies) == rotary_size // 2,
        f"inverse_frequencies must hold {rotary_size // 2} numbers",
    )
    for value in inputs[:2]:
        _require(_last(value) % head_size == 0, f"'{value.name}' is not made of heads of {head_size}")
    return [(inputs[0].shape, inputs[0].dtype), (inputs[1].shape, inputs[1].dtype)]


def _attention(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    heads, kv_heads = _integer(attributes, "heads"), _integer(attributes, "kv_heads")
    key_size, value_size = _integer(attributes, "key_size"), _integer(attributes, "value_size")
    query, key, value = inputs[:3]
    _require(heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups")
    _require(_last(query) == heads * key_size, f"query has {_last(query)} columns, not {heads} x {key_size}")
    _require(_last(key) == kv_heads * key_size, f"key has {_last(key)} columns, not {kv_heads} x {key_size}")
    _require(_last(value) == kv_heads * value_size, f"value has {_last(value)} columns, not {kv_heads} x {value_size}")
    return [((query.shape[0], heads * value_size), query.dtype)]


def _select_rows(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    return [((inputs[1].shape[0], *inputs[0].shape[1:]), inputs[0].dtype)]


def _route(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    experts, chosen = _last(inputs[0]), _integer(attributes, "top_k")
    groups, kept = _integer(attributes, "groups"), _integer(attributes, "top_groups")
    scoring, group_scoring = attributes["scoring"], attributes["group_scoring"]
    _require(scoring in ("softmax", "sigmoid"), f"scoring must be 'softmax' or 'sigmoid', not {scoring!r}")
    _require(group_scoring in ("largest", "two_largest"), f"group_scoring is {group_scoring!r}")
    _require(groups >= 1 and experts % groups == 0, f"{experts} experts do not divide into {groups} groups")
    _require(1 <= kept <= groups, f"top_groups must be between 1 and {groups}, not {kept}")
    _require(group_scoring == "largest" or experts // groups >= 2, "a group must have two experts to add two scores")
    allowed = experts // groups * kept
    _require(1 <= chosen <= allowed, f"top_k must be between 1 and {allowed}, not {chosen}")
    if "bias" in weights:
        _require(weights["bias"].shape == (experts,), f"bias must have shape ({experts},)")
    rows = inputs[0].shape[0]
    return [((rows, chosen), "int32"), ((rows, chosen), "float32")]


def _experts(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    x, ids, shares = inputs
    gate_up, down = weights["gate_up"].shape, weights["down"].shape
    _require(len(gate_up) == 3 and gate_up[1] % 2 == 0, f"gate_up must be [experts, 2 inner, hidden], not {gate_up}")
    experts, inner, hidden = gate_up[0], gate_up[1] // 2, gate_up[2]
    _require(down == (experts, hidden, inner), f"down must have shape {(experts, hidden, inner)}, not {down}")
    _require(_last(x) == hidden, f"input has {_last(x)} columns, the experts take {hidden}")
    _require(ids.dtype == "int32" and shares.dtype == "float32", "expert ids must be int32, their shares float32")
    _require(ids.shape == shares.shape and len(ids.shape) == 2, f"ids {ids.shape} and shares {shares.shape} differ")
    _require(ids.shape[0] == x.shape[0], f"{x.shape[0]} rows and {ids.shape[0]} choices")
    for role, size in (("gate_up_bias", 2 * inner), ("down_bias", hidden)):
        if role in weights:
            _require(weights[role].shape == (experts, size), f"{role} must have shape {(experts, size)}")
    return [(x.shape, x.dtype)]


def _scale_rows(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    x, factor = inputs
    _require(factor.shape == (*x.shape[:-1], 1), f"the factors must have shape {(*x.shape[:-1], 1)}")
    return [(x.shape, x.dtype)]


def _sample(
    inputs: Sequence[Value], weights: Mapping[str, Weight], attributes: Mapping[str, Attribute]
) -> Sequence[tuple[Shape, str]]:
    rows = inputs[0].shape[0]
    return [
        ((rows,), "int32"),
        ((rows,), "float32"),
        ((rows,), "int32"),
        ((rows, "L"), "int32"),
        ((rows, "L"), "float32"),
        ((rows,), "bool"),
    ]


_register("embedding", "token_ids", _embedding, weights="weight", scale=1.0, doc="Rows of the table, times scale.")
_register(
    "linear",
    "x",
    _linear,
    weights="weight",
    optional_weights="bias",
    split=None,
    doc=(
        "x @ weight.T + bias. split says how the sharding pass divides the weight: 'columns' (its outputs), "
        "'rows' (its inputs, then a sum over devices) or None (kept whole)."
    ),
)
_register(
    "logits",
    "x",
    _logits,
    weights="weight",
    optional_weights="bias",
    scale=1.0,
    soft_cap=None,
    doc="As linear, in float32, times scale; with soft_cap c then c * tanh(y / c).",
)
_register(
    "rms_norm",
    "x",
    _norm,
    weights="weight",
    epsilon=REQUIRED,
    offset=0.0,
    doc="x / sqrt(mean(x^2) + epsilon) * (weight + offset), over each run of columns as long as the weight.",
)
_register(
    "layer_norm",
    "x",
    _norm,
    weights="weight",
    optional_weights="bias",
    epsilon=REQUIRED,
    doc="(x - mean) / sqrt(variance + epsilon) * weight + bias, over each run of columns as long as the weight.",
)
_register("add", "a b", _same_shape, doc="a + b.")
_register("multiply", "a b", _same_shape, doc="a * b, element by element.")
_register("scale", "x", _same_shape, factor=REQUIRED, doc="x * factor.")
_register(
    "activation",
    "x",
    _same_shape,
    function=REQUIRED,
    doc="function(x): 'silu', 'gelu' (with erf), 'gelu_tanh', 'relu', 'relu_squared', 'sigmoid', 'tanh'.",
)
_register("gated", "gate up", _same_shape, function=REQUIRED, doc="function(gate) * up; functions as for activation.")
_register(
    "gated_pair",
    "x",
    _gated_pair,
    function=REQUIRED,
    doc="gated(first half of the columns, second half).",
)
_register(
    "add_rms_norm",
    "x residual",
    _add_rms_norm,
    weights="weight",
    epsilon=REQUIRED,
    offset=0.0,
    doc="sum = x + residual rounded to the activation type; returns (rms_norm(sum), sum).",
)
_register("split", "x", _split, sizes=REQUIRED, doc="Columns cut into consecutive parts.")
_register(
    "rotary",
    "query key positions",
    _rotary,
    head_size=REQUIRED,
    rotary_size=REQUIRED,
    inverse_frequencies=REQUIRED,
    amplitude=1.0,
    interleaved=False,
    doc=(
        "Rotates the first rotary_size columns of each head by the angle position * "
        "inverse_frequencies[i], for pairs (i, i + rotary_size/2), or (2i, 2i+1) when interleaved; "
        "cosine and sine are times amplitude. Returns (query, key)."
    ),
)
_register(
    "attention",
    "query key value query_starts context_lengths block_table slots",
    _attention,
    optional_weights="sinks",
    row_wise=False,
    group=REQUIRED,
    layer=REQUIRED,
    heads=REQUIRED,
    kv_heads=REQUIRED,
    key_size=REQUIRED,
    value_size=REQUIRED,
    scale=REQUIRED,
    window=None,
    soft_cap=None,
    alibi_slopes=None,
    doc=(
        "Writes key and value of each token into the cache at its slot, then lets each token attend to "
        "its request's cached tokens at its own position and before (within the last `window` ones, "
        "itself included). Query head h reads kv head h // (heads / kv_heads). Scores are "
        "query . key * scale, then soft capped, plus alibi_slopes[h] * (key position - query position); "
        "sinks[h], if given, joins the softmax as one more score that has no value."
    ),
)
_register(
    "route",
    "logits",
    _route,
    optional_weights="bias",
    top_k=REQUIRED,
    scoring="softmax",
    normalize=False,
    groups=1,
    top_groups=1,
    group_scoring="largest",
    scale=1.0,
    refusable=True,
    doc=(
        "Chooses top_k experts for each row. Scores are softmax(logits) over all experts, or sigmoid(logits). Experts "
        "are ranked by scores + bias; without a bias by the logits, or by the scores where two are added. Of several "
        "groups (consecutive experts, equally many) only the top_groups best can be chosen from; a group counts as "
        "much as its largest, or its two largest together. Among equals the lower number is better. Returns the "
        "experts' numbers, best first, and their scores: without bias, divided by their sum + 1e-20 if normalize, "
        "times scale."
    ),
)
_register(
    "experts",
    "x expert_ids expert_weights",
    _experts,
    weights="gate_up down",
    optional_weights="gate_up_bias down_bias",
    function=REQUIRED,
    limit=None,
    slope=1.0,
    up_offset=0.0,
    refusable=True,
    doc=(
        "The sum, in the order of expert_ids, of expert_weights[i] times what expert e = expert_ids[i] makes of a row: "
        "gate and up are the halves of x @ gate_up[e].T + gate_up_bias[e], cut at limit, up also at -limit; "
        "h = function(gate * slope) / slope * (up + up_offset), which may be rounded to the activation type; then "
        "h @ down[e].T + down_bias[e]. Functions as for activation. Ids are below the number of experts."
    ),
)
_register(
    "scale_rows",
    "x factor",
    _scale_rows,
    function=None,
    refusable=True,
    doc="x times function(factor), one factor for each row, factor itself where there is no function.",
)
_register(
    "select_rows",
    "x rows",
    _select_rows,
    row_wise=False,
    doc="Rows of x by index; used with the batch's rows_to_sample.",
)
_register(
    "sample",
    "logits sampling",
    _sample,
    row_wise=False,
    doc=(
        "Chooses a token for each row; the procedure is defined by midspan.runtimes.reference.sampling. "
        "Outputs: token ids [S]; logprob of the token [S]; its rank [S]; top token ids [S, L]; top "
        "logprobs [S, L]; rows that could not be sampled [S]. Logprob outputs are empty "
        "when sampling.num_logprobs is None."
    ),
)
