"""Native kernels called with numpy arrays, on every instruction set that is worth testing here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

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

Array = NDArray[Any]
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def code_of(array: Array) -> int:
    return ELEMENT_TYPES[array.dtype.name]


def address(array: Array) -> int:
    return int(array.ctypes.data)


def stride(array: Array) -> int:
    return array.strides[0] // array.itemsize


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

    def pack(self, weight: Array, weight_format: str | None = None, k: int | None = None) -> PackedLinear:
        """Pack a dense [n, k] array, or GGUF bytes [n, bytes] of k columns."""
        code = code_of(weight) if weight_format is None else GGUF_FORMATS[weight_format]
        n, columns = weight.shape[0], weight.shape[1] if k is None else k
        memory = aligned_bytes(self.library.packed_linear_bytes(code, n, columns))
        self.library.pack_linear(code, address(weight), weight.strides[0], n, columns, address(memory))
        return PackedLinear(memory=memory, n=n, k=columns, code=code)

    def linear(
        self,
        x: Array,
        packed: PackedLinear,
        *,
        bias: Array | None = None,
        output: str | None = None,
        scale: float = 1.0,
        soft_cap: float = 0.0,
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
        )
        self.library.linear(config, address(x), stride(x), len(x), address(y), stride(y))
        return y

    def rms_norm(self, x: Array, weight: Array, *, epsilon: float, offset: float = 0.0) -> Array:
        y = np.full(x.shape, 77, x.dtype)
        self.library.rms_norm(
            *(code_of(x), address(x), stride(x), *x.shape, address(weight), len(weight)),
            *(epsilon, offset, address(y), stride(y)),
        )
        return y

    def add_rms_norm(
        self, x: Array, residual: Array, weight: Array, *, epsilon: float, offset: float = 0.0
    ) -> tuple[Array, Array]:
        y, total = np.full(x.shape, 77, x.dtype), np.full(x.shape, 77, x.dtype)
        self.library.add_rms_norm(
            *(code_of(x), address(x), stride(x), address(residual), stride(residual), *x.shape),
            *(address(weight), len(weight), epsilon, offset),
            *(address(y), stride(y), address(total), stride(total)),
        )
        return y, total

    def gated(self, gate: Array, up: Array, function: str) -> Array:
        y = np.full(gate.shape, 77, gate.dtype)
        self.library.gated(
            *(code_of(gate), GATE_FUNCTIONS[function], address(gate), stride(gate), address(up), stride(up)),
            *(*gate.shape, address(y), stride(y)),
        )
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
        self.library.rotary(
            *(config, address(positions), len(positions), address(query), stride(query), address(key), stride(key)),
            *(address(outputs[0]), stride(outputs[0]), address(outputs[1]), stride(outputs[1])),
        )
        return outputs

    def embedding(
        self, ids: Array, table: Array, *, output: str, scale: float = 1.0, weight_format: str = "", columns: int = 0
    ) -> Array:
        code = GGUF_FORMATS[weight_format] if weight_format else code_of(table)
        width = columns or table.shape[1]
        y = np.full((len(ids), width), 77, DTYPES[output])
        self.library.embedding(
            *(code, address(table), table.strides[0], len(table), width, scale),
            *(address(ids), len(ids), code_of(y), address(y), stride(y)),
        )
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
            cache_type=code_of(batch.key_cache),
        )

    def write_cache(self, config: AttentionConfig, key: Array, value: Array, slots: Array) -> None:
        self.library.write_cache(
            config, address(key), stride(key), address(value), stride(value), address(slots), len(slots)
        )

    def attention(self, config: AttentionConfig, query: Array, batch: CacheBatch) -> Array:
        out = np.full((len(query), config.heads * config.value_size), 77, query.dtype)
        self.library.attention(
            *(config, address(query), stride(query), address(batch.query_starts), address(batch.context_lengths)),
            *(address(batch.block_table), batch.block_table.shape[1], len(batch.context_lengths)),
            *(address(out), stride(out)),
        )
        return out


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
    CacheBatch = CacheBatch


@pytest.fixture(scope="session")
def native_arrays() -> type[NativeArrays]:
    return NativeArrays
