"""Native kernels called with numpy arrays, on every instruction set that is worth testing here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ctypes import addressof, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from midspan_cpu.native_interface import (
    CACHE_TYPES,
    DENSE_FORMATS,
    OPERATIONS,
    SCALED_FORMATS,
    ExpertsConfig,
    Instruction,
    MatricesConfig,
    Matrix,
    RouteConfig,
    Step,
    WeightConfig,
)
from midspan_cpu.native_library import (
    ELEMENT_TYPES,
    GATE_FUNCTIONS,
    GGUF_FORMATS,
    AttentionConfig,
    LinearConfig,
    NativeLibrary,
    RotaryConfig,
    load_native_library,
)

WEIGHT_FORMATS = {**DENSE_FORMATS, **GGUF_FORMATS, **SCALED_FORMATS}

Array = NDArray[Any]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def code_of(array: Array) -> int:
    return ELEMENT_TYPES[array.dtype.name]


def cache_code_of(array: Array) -> int:
    return CACHE_TYPES[array.dtype.name.removesuffix("fn")]


def cache_numbers(memory: Array, rows: int, columns: int) -> Array:
    """A view [blocks, kv_heads, rows, columns] of the numbers of [blocks, kv_heads, bytes], scales left out."""
    view = memory[..., : rows * columns]
    view.shape = (*memory.shape[:2], rows, columns)
    return view


def cache_scales(memory: Array, block_size: int) -> Array:
    """A view [blocks, kv_heads, block_size] of the scales behind the numbers."""
    return memory[..., -2 * block_size :].view(ml_dtypes.bfloat16)


def address(array: Array) -> int:
    return int(array.ctypes.data)


def stride(array: Array) -> int:
    return array.strides[0] // array.itemsize


def matrix(array: Array) -> Matrix:
    return Matrix(address(array), stride(array))


def aligned_bytes(count: int) -> Array:
    """Uninitialised bytes that begin at a multiple of 64."""
    memory = np.full(count + 64, 0xA5, np.uint8)
    start = -address(memory) % 64
    return memory[start : start + count]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """A weight as the kernel takes it."""

    memory: Array
    n: int
    k: int
    code: int
    group: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheBatch:
    """A layer's cache and what a call of attention is about; positions and blocks as in a step's batch."""

    key_cache: Array
    value_cache: Array
    query_starts: Array
    context_lengths: Array
    block_table: Array
    slots: Array


class Kernels:
    """The native functions over numpy arrays."""

    def __init__(self, library: NativeLibrary) -> None:
        self.library = library

    def pack(
        self,
        weight: Array,
        weight_format: str | None = None,
        k: int | None = None,
        scales: Array | None = None,
        zeros: Array | None = None,
    ) -> PackedLinear:
        """Pack a dense [n, k] array, or rows of a format of k columns with the numbers that belong to it."""
        columns = weight.shape[1] if k is None else k
        config = WeightConfig(
            rows=address(weight),
            row_bytes=weight.strides[0],
            scales=None if scales is None else address(scales),
            zeros=None if zeros is None else address(zeros),
            n=weight.shape[0],
            k=columns,
            group=0 if zeros is None else columns // zeros.shape[1],
            format=code_of(weight) if weight_format is None else WEIGHT_FORMATS[weight_format],
        )
        memory = aligned_bytes(self.library.packed_linear_bytes(config))
        self.library.pack_linear(config, address(memory))
        return PackedLinear(memory=memory, n=config.n, k=config.k, code=config.format, group=config.group)

    def linear(
        self,
        x: Array,
        packed: PackedLinear,
        *,
        bias: Array | None = None,
        output: str | None = None,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        order: Array | None = None,
    ) -> Array:
        y = np.full((len(x), packed.n), 77, DTYPES[output] if output else x.dtype)
        config = LinearConfig(
            packed=address(packed.memory),
            bias=None if bias is None else address(bias),
            n=packed.n,
            k=packed.k,
            format=packed.code,
            input_type=code_of(x),
            output_type=code_of(y),
            scale=scale,
            soft_cap=soft_cap,
            group=packed.group,
            order=None if order is None else address(order),
        )
        self._run("linear", len(x), config=addressof(config), x=matrix(x), y=matrix(y))
        return y

    def rms_norm(self, x: Array, weight: Array, *, epsilon: float, offset: float = 0.0) -> Array:
        y = np.full(x.shape, 77, x.dtype)
        self._norm("rms_norm", x, weight, epsilon, offset, x=matrix(x), y=matrix(y))
        return y

    def add_rms_norm(
        self, x: Array, residual: Array, weight: Array, *, epsilon: float, offset: float = 0.0
    ) -> tuple[Array, Array]:
        y, total = np.full(x.shape, 77, x.dtype), np.full(x.shape, 77, x.dtype)
        places = {"x": matrix(x), "x2": matrix(residual), "y": matrix(y), "y2": matrix(total)}
        self._norm("add_rms_norm", x, weight, epsilon, offset, **places)
        return y, total

    def gated(self, gate: Array, up: Array, function: str) -> Array:
        y = np.full(gate.shape, 77, gate.dtype)
        places = {"x": matrix(gate), "x2": matrix(up), "y": matrix(y)}
        code = GATE_FUNCTIONS[function]
        self._run("gated", len(gate), type=code_of(gate), code=code, columns=gate.shape[1], **places)
        return y

    def rotary(
        self, query: Array, key: Array, positions: Array, table: Array, *, head_size: int, interleaved: bool
    ) -> tuple[Array, Array]:
        outputs = np.full(query.shape, 77, query.dtype), np.full(key.shape, 77, key.dtype)
        config = RotaryConfig(
            table=address(table),
            table_rows=len(table),
            head_size=head_size,
            rotary_size=table.shape[1],
            query_heads=query.shape[1] // head_size,
            key_heads=key.shape[1] // head_size,
            type=code_of(query),
            interleaved=int(interleaved),
        )
        places = {"x": matrix(query), "x2": matrix(key), "y": matrix(outputs[0]), "y2": matrix(outputs[1])}
        self._run("rotary", len(positions), positions, config=addressof(config), **places)
        return outputs

    def embedding(
        self, ids: Array, table: Array, *, output: str, scale: float = 1.0, weight_format: str = "", columns: int = 0
    ) -> Array:
        code = GGUF_FORMATS[weight_format] if weight_format else code_of(table)
        width = columns or table.shape[1]
        y = np.full((len(ids), width), 77, DTYPES[output])
        self._run(
            "embedding",
            len(ids),
            ids,
            type=code_of(y),
            code=code,
            config=address(table),
            config_columns=len(table),
            row_bytes=table.strides[0],
            columns=width,
            real=scale,
            y=matrix(y),
        )
        return y

    def combine(
        self, op: str, x: Array, x2: Array | None = None, *, factor: float = 1.0, sigmoid: bool = False
    ) -> Array:
        y = np.full(x.shape, 77, x.dtype)
        places = {"x": matrix(x), "y": matrix(y)} if x2 is None else {"x": matrix(x), "x2": matrix(x2), "y": matrix(y)}
        size = {"columns": x.shape[1], "real": factor, "code": int(sigmoid)}
        self._run(op, len(x), type=code_of(x), **size, **places)
        return y

    def route(
        self,
        logits: Array,
        bias: Array | None,
        *,
        top_k: int,
        scoring: str,
        normalize: bool,
        groups: int,
        top_groups: int,
        group_scoring: str,
        scale: float,
    ) -> tuple[Array, Array]:
        ids, shares = np.full((len(logits), top_k), 77, np.int32), np.full((len(logits), top_k), 77, np.float32)
        config = RouteConfig(
            bias=None if bias is None else address(bias),
            experts=logits.shape[1],
            chosen=top_k,
            groups=groups,
            top_groups=top_groups,
            type=code_of(logits),
            sigmoid=int(scoring == "sigmoid"),
            two_largest=int(group_scoring == "two_largest"),
            normalize=int(normalize),
            scale=scale,
        )
        self._run("route", len(logits), config=addressof(config), x=matrix(logits), y=matrix(ids), y2=matrix(shares))
        return ids, shares

    def experts(
        self,
        x: Array,
        ids: Array,
        shares: Array,
        matrices: tuple[MatricesConfig, MatricesConfig, MatricesConfig],
        *,
        experts: int,
        inner: int,
        function: str = "silu",
        limit: float = np.inf,
        slope: float = 1.0,
        up_offset: float = 0.0,
    ) -> Array:
        """Gate, up and down as the kernel takes them."""
        y = np.full(x.shape, 77, x.dtype)
        config = ExpertsConfig(
            *matrices,
            experts=experts,
            chosen=ids.shape[1],
            hidden=x.shape[1],
            inner=inner,
            type=code_of(x),
            function=GATE_FUNCTIONS[function],
            limit=limit,
            slope=slope,
            up_offset=up_offset,
        )
        places = {"x": matrix(x), "x2": matrix(ids), "y": matrix(y), "y2": matrix(shares)}
        self._run("experts", len(x), config=addressof(config), **places)
        return y

    def argmax(self, logits: Array) -> tuple[Array, Array]:
        ids, failed = np.full(len(logits), 77, np.int32), np.full(len(logits), 77, np.uint8)
        self.library.argmax(address(logits), stride(logits), *logits.shape, address(ids), address(failed))
        return ids, failed

    def attention_config(
        self,
        batch: CacheBatch,
        query: Array,
        *,
        heads: int,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
    ) -> AttentionConfig:
        blocks, kv_heads, key_size, block_size = batch.key_cache.shape
        return AttentionConfig(
            key_cache=address(batch.key_cache),
            value_cache=address(batch.value_cache),
            blocks=blocks,
            block_size=block_size,
            heads=heads,
            kv_heads=kv_heads,
            key_size=key_size,
            value_size=batch.value_cache.shape[3],
            window=window,
            alibi_slopes=None if alibi_slopes is None else address(alibi_slopes),
            sinks=None if sinks is None else address(sinks),
            scale=scale,
            soft_cap=soft_cap,
            type=code_of(query),
            cache_type=cache_code_of(batch.key_cache),
        )

    def write_cache(self, config: AttentionConfig, key: Array, value: Array, slots: Array) -> None:
        self._run("write_cache", len(slots), slots, config=addressof(config), x=matrix(key), x2=matrix(value))

    def attention(self, config: AttentionConfig, query: Array, batch: CacheBatch) -> Array:
        out = np.full((len(query), config.heads * config.value_size), 77, query.dtype)
        integers = (batch.query_starts, batch.context_lengths, batch.block_table)
        self._run("attention", len(query), *integers, config=addressof(config), x=matrix(query), y=matrix(out))
        return out

    def _norm(self, op: str, rows: Array, weight: Array, epsilon: float, offset: float, **places: Matrix) -> None:
        size = {"columns": rows.shape[1], "config": address(weight), "config_columns": len(weight)}
        self._run(op, len(rows), type=code_of(rows), real=epsilon, offset=offset, **size, **places)

    def _run(self, op: str, rows: int, *integers: Array, **fields: Any) -> None:
        """One instruction on a step of so many tokens."""
        addresses = (c_void_p * 4)(*(address(array) for array in integers))
        strides = (c_int64 * 4)(*(stride(array) for array in integers))
        requests = len(integers[1]) if op == "attention" else 0
        step = Step(
            tokens=rows, requests=requests, sampled=0, integers=addressof(addresses), strides=addressof(strides)
        )
        numbers = tuple(range(len(integers)))
        program = (Instruction * 1)(Instruction(op=OPERATIONS[op], integers=numbers, **fields))
        self.library.run_plan(program, step, 0, 1)


def instruction_sets() -> list[str]:
    """All that this processor runs, or the portable one and the one that the environment names."""
    wanted = os.environ.get("MIDSPAN_CPU_ISA")
    found = load_native_library(instruction_set=wanted or None, threads=1)
    assert isinstance(found, NativeLibrary), found
    names = {"portable", wanted} if wanted else set(found.runnable_sets)
    found.close()
    return sorted(names)


@pytest.fixture(scope="session", params=instruction_sets())
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Kernels of one instruction set with three threads of their own."""
    library = load_native_library(instruction_set=request.param, threads=3)
    assert isinstance(library, NativeLibrary), library
    yield Kernels(library)
    library.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


class NativeArrays:
    """What tests need of this file beside the kernels."""

    aligned_bytes = staticmethod(aligned_bytes)
    cache_numbers = staticmethod(cache_numbers)
    cache_scales = staticmethod(cache_scales)
    address = staticmethod(address)
    CacheBatch = CacheBatch


@pytest.fixture(scope="session")
def native_arrays() -> type[NativeArrays]:
    return NativeArrays
