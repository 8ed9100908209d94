"""How far a kernel's output may lie from the definition's: derived, case by case.

Both the kernel and the definition compute in float32 in an order of their own
and round once to the activation type. With u = 2^-24 for float32 and v for the
activation type (2^-24, 2^-8, 2^-11), each may be off the exact value by its
arithmetic error e, so they lie within 2 e of each other before rounding; rounding
adds at most v |y| to each. Hence

    |kernel - definition| <= 2 e + 2 v |y| + t,    t: float16's or float32's smallest step.

What is left is e, the worst case of one float32 evaluation (Higham, "Accuracy and
Stability of Numerical Algorithms", chapter 3: a sum of n terms in any order is off by
at most n u times the sum of their magnitudes). Knows no device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.operation_case import OperationCase
from midspan.conformance.packed_cases import columns_together
from midspan.runtimes.reference.packed_weights import rounded_rows
from midspan.weights.array_formats import DYNAMIC

Float64 = NDArray[np.float64]

FLOAT32_UNIT = 2.0**-24
UNITS: Mapping[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
STEPS: Mapping[str, float] = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}

FUNCTION_UNITS = 8.0
"""Units of float32 by which exp, tanh, erf, sine or cosine of a vector library may be off, with
what surrounds them in an activation function: the libraries state at most 4."""

LARGEST_INTEGER = 32767.0
"""Of 16 bits; rounding to such integers is off by half a step."""

CACHE_GROWTH: Mapping[str, float] = {"float8_e4m3": 2.0**-4, "int8": 2.0**-4}
"""By which share a cache type may make a row longer, where that is more than the margins' own slack: half a
step of three mantissa bits; or half of 1/127 of the largest for each of 256 numbers, which is sqrt(256) / 254 of
the length. A key and a value make a result, so it counts twice. Multiplying by a scale is among the three roundings
of a score and the four of a sum."""

SATURATED = 128.0
"""Beyond it float32's exp is zero or infinite, and tanh and erf are one."""


def margins(case: OperationCase, dtype: str, cache_dtype: str = "float32") -> tuple[Float64, ...]:
    """The allowed distance for each element of each output.

    Args:
        case: not of the operation ``sample``, whose outputs are exact but for logprobs.
        dtype: the activation type.
        cache_dtype: the KV cache's type, in which kernel and definition round keys and values alike.

    Returns:
        float64 arrays in the outputs' shapes.
    """
    outputs, _ = case.expected("float32", cache_dtype)
    wide = [np.abs(np.asarray(output, np.float64)) for output in outputs]
    wide_outputs = case.op in ("logits", "route")
    unit = FLOAT32_UNIT if wide_outputs else UNITS[dtype]
    step = STEPS["float32"] if wide_outputs else STEPS[dtype]
    with np.errstate(all="ignore"):  # some cases hold what is no number; the check asks for those to be met exactly
        growth = 1.0 + CACHE_GROWTH.get(cache_dtype, 0.0)
        arithmetic = [error * growth**2 for error in _ERRORS[case.op](case, wide)]
        unpacking = _unpacking(case, dtype) + _rounded_inside(case, dtype)
        return tuple(
            2.0 * FLOAT32_UNIT * error + 2.0 * unit * output + unpacking + step
            for error, output in zip(arithmetic, wide, strict=True)
        )


def _unpacking(case: OperationCase, dtype: str) -> Float64:
    """What a packed weight may cost beside that.

    It may be rounded to the activation type when it is unpacked, or be used as it is; and inputs
    may become 16-bit integers, with one scale for as many of them as share a scale in the format.
    """
    if not case.packed:
        return np.zeros(())
    weight, inputs = _magnitude(case.weights["weight"]), np.asarray(case.inputs[0])
    if case.op == "embedding":
        return np.asarray(2.0 * UNITS[dtype] * weight[inputs])
    if case.packed["weight"].format == DYNAMIC:
        return np.asarray(_near_halves(np.asarray(inputs, np.float32)) @ weight.T)
    x = _magnitude(inputs)
    values = columns_together(case.packed["weight"].format)
    blocks = x.reshape(x.shape[0], x.shape[1] // values, values)
    largest = np.broadcast_to(blocks.max(axis=-1, keepdims=True), blocks.shape).reshape(x.shape)
    return np.asarray((2.0 * UNITS[dtype] * x + largest / LARGEST_INTEGER) @ weight.T)


def _near_halves(x: NDArray[np.float32]) -> Float64:
    """What rounding x to 8 bits the other way costs, where x / s lies so near to a half that it may go either way.

    s is off by a rounding and so is the quotient, or the product with the reciprocal that stands for it: by four
    units of 127 at most.
    """
    _, steps = rounded_rows(x)
    divisors = np.where(steps == 0.0, 1.0, steps).astype(np.float64)[:, None]
    quotients = x.astype(np.float64) / divisors
    distance = np.abs(np.abs(quotients - np.floor(quotients)) - 0.5)
    return np.asarray(np.where(distance <= 4.0 * 127.0 * FLOAT32_UNIT, steps[:, None], 0.0), np.float64)


def _rounded_inside(case: OperationCase, dtype: str) -> Float64:
    """What it may cost that an expert's middle is rounded to the activation type."""
    if case.op != "experts":
        return np.zeros(())
    return np.asarray(2.0 * UNITS[dtype] * _through_experts(case, lambda gate, up, size: gate * up))


Errors = Callable[[OperationCase, list[Float64]], list[Float64]]
"""(case, magnitudes of the outputs) -> e of each output, in units of float32."""


def _magnitude(array: Any) -> Float64:
    return np.abs(np.asarray(array, np.float64))


def _one_rounding(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    return list(outputs)


def _function(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """The error grows with exp's argument until that saturates; beyond, what is left is the result's rounding."""
    x = _magnitude(case.inputs[0])
    factor: Float64 = np.ones_like(x)
    if case.op == "gated":
        factor = _magnitude(case.inputs[1])
    if case.op == "gated_pair":
        x, factor = np.split(x, 2, axis=-1)
    return [FUNCTION_UNITS * ((1.0 + np.minimum(x, SATURATED)) ** 2 * factor + outputs[0])]


def _product(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """in + 2 roundings of sums whose magnitudes are |x| |w|; scale and cap shrink or keep them."""
    x, weight = _magnitude(case.inputs[0]), _magnitude(case.weights["weight"])
    total = x @ weight.T
    if "bias" in case.weights:
        total = total + _magnitude(case.weights["bias"])
    error = (x.shape[-1] + 2) * total
    if case.op == "logits":
        error = error * abs(float(case.all_attributes()["scale"])) + 2.0 * outputs[0]  # type: ignore[arg-type]
        cap = case.attributes.get("soft_cap")
        error = error + (FUNCTION_UNITS * float(cap) if isinstance(cap, float) else 0.0)
    return [error]


def _rms(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """The sum of n squares is off by n units, its root by half of that; six more roundings."""
    size = case.weights["weight"].shape[-1]
    return [(size / 2 + 6) * outputs[0]]


def _add_rms(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    return [*_rms(case, outputs), outputs[1]]


def _layer_norm(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """As RMS norm, and the mean's error of n units of the mean magnitude moves every centred value."""
    size = case.weights["weight"].shape[-1]
    x = np.asarray(case.inputs[0], np.float64)
    runs = x.reshape(x.shape[0], x.shape[1] // size, size)
    deviation = np.sqrt(runs.var(axis=-1, keepdims=True) + float(case.attributes["epsilon"]))  # type: ignore[arg-type]
    moved = (size + 2) * (np.abs(runs).mean(axis=-1, keepdims=True) + np.abs(runs)) / deviation
    moved = (moved * _magnitude(case.weights["weight"])).reshape(x.shape)
    return [moved * 2 + (size / 2 + 6) * outputs[0]]


def _rotary(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """Sine and cosine, two products and a sum; the partner of a pair is at most the head's largest."""
    head = int(case.attributes["head_size"])  # type: ignore[arg-type]
    amplitude = max(1.0, abs(float(case.all_attributes()["amplitude"])))  # type: ignore[arg-type]
    errors = []
    for value in case.inputs[:2]:
        x = _magnitude(value)
        largest = x.reshape(x.shape[0], x.shape[1] // head, head).max(axis=-1, keepdims=True, initial=0.0)
        spread = np.broadcast_to(largest, (x.shape[0], x.shape[1] // head, head)).reshape(x.shape)
        errors.append((FUNCTION_UNITS + 4) * 2 * amplitude * spread)
    return errors


def _attention(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """A score's error d moves each share by the factor exp(2 d); then a sum over n tokens of shares times values."""
    if case.cache is None:
        return list(outputs)
    attributes, group = case.all_attributes(), case.cache.group
    query, key, value = (_magnitude(array) for array in case.inputs[:3])
    cached = np.nan_to_num(np.abs(case.cache.data.astype(np.float64)))
    largest_key = max(_longest(key, group.key_size), _longest(cached[:, 0], cached.shape[-1]))
    largest_value = max(value.max(initial=0.0), cached[:, 1].max(initial=0.0))
    scale = abs(float(attributes["scale"]))  # type: ignore[arg-type]
    tokens = int(np.asarray(case.inputs[4]).max(initial=0))
    score = scale * _longest(query, group.key_size) * largest_key  # at least the sum of |q k|: Cauchy and Schwarz
    slopes = attributes["alibi_slopes"]
    tilt = max((abs(float(slope)) for slope in slopes), default=0.0) * tokens if isinstance(slopes, tuple) else 0.0
    moved = (group.key_size + 3) * score + FUNCTION_UNITS * (score + tilt) + FUNCTION_UNITS
    return [np.full_like(outputs[0], (2.0 * moved + tokens + 4) * largest_value)]


def _route(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """Numbers of experts are exact; of a share the powers and their sum may be off, and the sum of the chosen ones."""
    logits = _magnitude(case.inputs[0])
    powers = FUNCTION_UNITS * (1.0 + 2.0 * logits.max(axis=-1, keepdims=True, initial=0.0))
    return [np.zeros_like(outputs[0]), 4.0 * (powers + logits.shape[-1]) * outputs[1]]


def _experts(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    """Errors of gate and up pass the function, whose slope is below two, and the second product; then the sum."""
    inner, hidden = case.weights["down"].shape[2], case.weights["down"].shape[1]
    chosen = np.asarray(case.inputs[1]).shape[1]

    def moved(gate: Float64, up: Float64, size: Float64) -> Float64:
        summed: Float64 = (hidden + 3) * size
        return np.asarray((2.0 * summed + FUNCTION_UNITS * (1.0 + gate) ** 2) * (1.0 + up) + summed * gate)

    total = _through_experts(case, lambda gate, up, size: gate * up, biased=True)
    return [_through_experts(case, moved) + (inner + chosen + 4) * total]


def _through_experts(
    case: OperationCase, middle: Callable[[Float64, Float64, Float64], Float64], *, biased: bool = False
) -> Float64:
    """Sum of shares times magnitudes of down's weights times ``middle(gate, up, largest sum)`` of each row.

    gate and up: bounds of their magnitudes after the activation; the third: the magnitudes that their sums add up.
    """
    x, ids, shares = _magnitude(case.inputs[0]), np.asarray(case.inputs[1]), _magnitude(case.inputs[2])
    gate_up, down = _magnitude(case.weights["gate_up"]), _magnitude(case.weights["down"])
    offset = abs(float(case.all_attributes()["up_offset"]))  # type: ignore[arg-type]
    total: Float64 = np.zeros(x.shape)
    for place in range(ids.shape[1]):
        sums = np.einsum("nh,nih->ni", x, gate_up[ids[:, place]])
        if "gate_up_bias" in case.weights:
            sums = sums + _magnitude(case.weights["gate_up_bias"])[ids[:, place]]
        gate, up = np.split(sums, 2, axis=-1)
        made = np.einsum("ni,nhi->nh", middle(gate, up + offset, np.maximum(gate, up)), down[ids[:, place]])
        if biased and "down_bias" in case.weights:
            made = made + _magnitude(case.weights["down_bias"])[ids[:, place]]
        total += shares[:, place : place + 1] * made
    return total


def _scale_rows(case: OperationCase, outputs: list[Float64]) -> list[Float64]:
    x, factor = _magnitude(case.inputs[0]), _magnitude(case.inputs[1])
    return [FUNCTION_UNITS * ((1.0 + np.minimum(factor, SATURATED)) ** 2 * x + outputs[0])]


def _longest(array: Float64, size: int) -> float:
    """The largest Euclidean length of a head."""
    return float(np.sqrt((array.reshape(-1, size) ** 2).sum(axis=-1)).max(initial=0.0))


_ERRORS: Mapping[str, Errors] = {
    "embedding": _one_rounding,
    "linear": _product,
    "logits": _product,
    "rms_norm": _rms,
    "layer_norm": _layer_norm,
    "add": _one_rounding,
    "multiply": _one_rounding,
    "scale": _one_rounding,
    "activation": _function,
    "gated": _function,
    "gated_pair": _function,
    "add_rms_norm": _add_rms,
    "split": _one_rounding,
    "rotary": _rotary,
    "attention": _attention,
    "route": _route,
    "experts": _experts,
    "scale_rows": _scale_rows,
    "select_rows": _one_rounding,
}
