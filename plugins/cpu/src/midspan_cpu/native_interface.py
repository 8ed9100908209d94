"""``native/midspan_cpu.h`` in ctypes: codes, structures and signatures.

Knows no library that is loaded. Must say what the header says; the interface
version is checked when a library is loaded.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

ABI_VERSION = 5

ELEMENT_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Codes of element types."""

CACHE_TYPES = {**ELEMENT_TYPES, "float8_e4m3": 8, "int8": 9}
"""Codes of cache types."""

DENSE_FORMATS = {**ELEMENT_TYPES, "pairs": 3}
"""Codes of dense weight formats."""

SCALED_FORMATS = {"int8.channel": 32, "fp8.channel": 33, "int8.dynamic": 34, "int4.group": 35}
"""Codes of formats of small numbers with float32 scales beside them."""

GGUF_FORMATS = {
    "gguf.q4_0": 16,
    "gguf.q4_1": 17,
    "gguf.q8_0": 18,
    "gguf.q5_0": 19,
    "gguf.q5_1": 20,
    "gguf.q4_k": 21,
    "gguf.q5_k": 22,
    "gguf.q6_k": 23,
}
"""Codes of formats of GGUF files."""

GATE_FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""Codes of gate functions."""


class LinearConfig(Structure):
    """``midspan_cpu_linear``: what stays the same between calls of one linear."""

    _fields_ = [
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int32),
        ("input_type", c_int32),
        ("output_type", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("group", c_int32),
        ("order", c_void_p),
    ]


class WeightConfig(Structure):
    """``midspan_cpu_weight``: a weight before it is packed."""

    _fields_ = [
        ("rows", c_void_p),
        ("row_bytes", c_int64),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int32),
        ("group", c_int32),
    ]


class RotaryConfig(Structure):
    """``midspan_cpu_rotary``: what stays the same between calls of one rotary."""

    _fields_ = [
        ("table", c_void_p),
        ("table_rows", c_int64),
        ("head_size", c_int64),
        ("rotary_size", c_int64),
        ("query_heads", c_int64),
        ("key_heads", c_int64),
        ("type", c_int32),
        ("interleaved", c_int32),
    ]


class AttentionConfig(Structure):
    """``midspan_cpu_attention``: what stays the same between calls of one attention layer."""

    _fields_ = [
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("blocks", c_int64),
        ("block_size", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("key_size", c_int64),
        ("value_size", c_int64),
        ("window", c_int64),
        ("alibi_slopes", c_void_p),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("type", c_int32),
        ("cache_type", c_int32),
    ]


class SamplingConfig(Structure):
    """``midspan_cpu_sampling``: how to choose a token for each row."""

    _fields_ = [
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("numbers", c_void_p),
        ("edit_starts", c_void_p),
        ("edit_ids", c_void_p),
        ("edit_repetition", c_void_p),
        ("edit_bias", c_void_p),
        ("allowed", c_void_p),
        ("allowed_words", c_int64),
        ("targets", c_void_p),
        ("has_target", c_void_p),
    ]


class RouteConfig(Structure):
    """``midspan_cpu_route``: how experts are chosen."""

    _fields_ = [
        ("bias", c_void_p),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("type", c_int32),
        ("sigmoid", c_int32),
        ("two_largest", c_int32),
        ("normalize", c_int32),
        ("scale", c_float),
    ]


class MatricesConfig(Structure):
    """``midspan_cpu_matrices``: one packed matrix of each expert."""

    _fields_ = [
        ("packed", c_void_p),
        ("bytes", c_int64),
        ("strip_bytes", c_int64),
        ("bias", c_void_p),
        ("bias_stride", c_int64),
        ("format", c_int32),
        ("group", c_int32),
    ]


class ExpertsConfig(Structure):
    """``midspan_cpu_experts``: what stays the same between calls of one layer of experts."""

    _fields_ = [
        ("gate", MatricesConfig),
        ("up", MatricesConfig),
        ("down", MatricesConfig),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("type", c_int32),
        ("function", c_int32),
        ("limit", c_float),
        ("slope", c_float),
        ("up_offset", c_float),
    ]


OPERATIONS = {
    "linear": 0,
    "rms_norm": 1,
    "add_rms_norm": 2,
    "gated": 3,
    "rotary": 4,
    "embedding": 5,
    "select_rows": 6,
    "write_cache": 7,
    "attention": 8,
    "route": 20,
    "experts": 21,
    "scale_rows": 22,
    "add": 23,
    "multiply": 24,
    "scale": 25,
}
"""Codes of what an instruction runs."""

TOKEN_ROWS, SAMPLED_ROWS = 0, 1
"""Which of a step's counts is the number of an instruction's rows."""


class Matrix(Structure):
    """``midspan_cpu_matrix``: the address of the first row, and elements from row to row."""

    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Instruction(Structure):
    """``midspan_cpu_instruction``: one kernel of a plan."""

    _fields_ = [
        ("op", c_int32),
        ("rows", c_int32),
        ("type", c_int32),
        ("code", c_int32),
        ("integers", c_int32 * 4),
        ("config", c_void_p),
        ("config_columns", c_int64),
        ("row_bytes", c_int64),
        ("columns", c_int64),
        ("real", c_float),
        ("offset", c_float),
        ("x", Matrix),
        ("x2", Matrix),
        ("y", Matrix),
        ("y2", Matrix),
    ]


class Step(Structure):
    """``midspan_cpu_step``: what differs between steps."""

    _fields_ = [
        ("tokens", c_int64),
        ("requests", c_int64),
        ("sampled", c_int64),
        ("integers", c_void_p),
        ("strides", c_void_p),
    ]


_POINTER, _SIZE, _CODE, _REAL = c_void_p, c_int64, c_int32, c_float
_MATRIX = (_POINTER, _SIZE)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack_linear": (POINTER(WeightConfig), _POINTER),
    "read": (_POINTER, _SIZE, _POINTER),
    "argmax": (*_MATRIX, _SIZE, _SIZE, _POINTER, _POINTER),
    "sample": (POINTER(SamplingConfig), *_MATRIX, _SIZE, _SIZE, _POINTER, _POINTER),
    "run_plan": (_POINTER, _SIZE, POINTER(Step), _POINTER, POINTER(_SIZE)),
}
"""Functions that take the context first and return a result code: the other argument types."""
