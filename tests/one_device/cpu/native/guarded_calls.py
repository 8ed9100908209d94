"""Calls native kernels with buffers that end where an unreadable page begins; a step too far ends the process.

Run as a program, with the name of an instruction set.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from midspan.runtimes.reference.cached_rows import CACHE_TYPES
from midspan_cpu.native_interface import SamplingConfig
from midspan_cpu.native_library import NativeLibrary, load_native_library

PAGE = mmap.PAGESIZE


def guarded(array: Any) -> Any:
    """A copy whose last byte is the last one before an unreadable page."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = -(-max(array.nbytes, 1) // PAGE)
    start = libc.mmap(None, (pages + 1) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    assert libc.mprotect(start + pages * PAGE, PAGE, 0) == 0
    memory = (ctypes.c_char * array.nbytes).from_address(start + pages * PAGE - array.nbytes)
    copy = np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def random(shape: tuple[int, ...], dtype: str) -> Any:
    return guarded(np.random.default_rng(1).standard_normal(shape).astype(conftest.DTYPES[dtype]))


def check_linear(kernels: conftest.Kernels, dtype: str) -> None:
    for rows, n, k in [(1, 33, 37), (7, 16, 64), (50, 31, 5)]:
        x, weight, bias = random((rows, k), dtype), random((n, k), dtype), random((n,), "float32")
        packed = kernels.pack(weight)
        memory = guarded(packed.memory)
        if memory.ctypes.data % 64 == 0:
            packed = conftest.PackedLinear(memory=memory, n=n, k=k, code=packed.code)
        kernels.linear(x, packed, bias=bias)
    for name, block_bytes in [("gguf.q4_0", 18), ("gguf.q4_1", 20), ("gguf.q8_0", 34)]:
        blocks = guarded(np.zeros((19, 3 * block_bytes), np.uint8))
        packed = kernels.pack(blocks, name, 96)
        kernels.linear(random((5, 96), dtype), packed)
        kernels.embedding(guarded(np.array([18], np.int32)), blocks, output=dtype, weight_format=name, columns=96)


def check_rows(kernels: conftest.Kernels, dtype: str) -> None:
    for columns in [1, 31, 100]:
        x, weight = random((3, columns), dtype), random((columns,), "float32")
        kernels.rms_norm(x, weight, epsilon=1e-5)
        kernels.add_rms_norm(x, random((3, columns), dtype), weight, epsilon=1e-5)
        kernels.gated(x, random((3, columns), dtype), "silu")
        kernels.embedding(guarded(np.array([2, 0], np.int32)), x, output=dtype)
        kernels.argmax(random((3, columns), "float32"))
    positions, table = guarded(np.array([0, 9], np.int32)), random((10, 6), "float32")
    for interleaved in [False, True]:
        query, key = random((2, 21), dtype), random((2, 7), dtype)
        kernels.rotary(query, key, positions, table, head_size=7, interleaved=interleaved)


def check_sampling(library: NativeLibrary) -> None:
    for columns in [1, 63, 129, 1000]:
        logits, rows = random((4, columns), "float32"), 4
        held = {
            "temperature": guarded(np.array([0.0, 1.0, 0.5, 2.0], np.float32)),
            "top_k": guarded(np.array([columns, columns, 1, min(columns, 9)], np.int32)),
            "top_p": guarded(np.array([1.0, 0.9, 0.5, 0.7], np.float32)),
            "min_p": guarded(np.array([0.0, 0.1, 0.0, 0.0], np.float32)),
            "numbers": guarded(np.array([0.0, 0.3, 0.6, 0.99999], np.float32)),
            "edit_starts": guarded(np.array([0, 1, 1, 2, 2], np.int32)),
            "edit_ids": guarded(np.array([columns - 1, 0], np.int32)),
            "edit_repetition": guarded(np.array([1.5, 1.0], np.float32)),
            "edit_bias": guarded(np.array([0.0, 2.0], np.float32)),
            "allowed": guarded(np.full((rows, -(-columns // 32)), 0xFFFFFFFF, np.uint32)),
            "targets": guarded(np.array([0, 0, 0, columns - 1], np.int32)),
            "has_target": guarded(np.array([0, 0, 0, 1], np.uint8)),
        }
        addresses = {name: conftest.address(array) for name, array in held.items()}
        config = SamplingConfig(**addresses, allowed_words=held["allowed"].shape[1])
        ids, failed = guarded(np.zeros(rows, np.int32)), guarded(np.ones(rows, np.uint8))
        where = (conftest.address(logits), columns, rows, columns)
        library.sample(config, *where, conftest.address(ids), conftest.address(failed))
        assert not failed.any()
        assert ids[3] == columns - 1


def cache_side(blocks: int, rows: int, columns: int, block_size: int, dtype: str) -> Any:
    """Random keys or values of one kv head, scales behind them where the type has them."""
    scaled = dtype == "int8"
    numbers = np.random.default_rng(1).standard_normal((blocks, 1, rows * columns + 2 * block_size * scaled))
    memory = guarded(numbers.astype(CACHE_TYPES[dtype]))
    if scaled:
        conftest.cache_scales(memory, block_size)[:] = 1.0
    return conftest.cache_numbers(memory, rows, columns)


def check_attention(kernels: conftest.Kernels, dtype: str, cache_dtype: str, key_size: int, value_size: int) -> None:
    """The last block of the cache is the one in use, so that a step too far leaves the cache."""
    heads, blocks, block_size, length = 3, 6, 16, 83
    batch = conftest.CacheBatch(
        key_cache=cache_side(blocks, key_size, block_size, block_size, cache_dtype),
        value_cache=cache_side(blocks, block_size, value_size, block_size, cache_dtype),
        query_starts=guarded(np.array([0, 20], np.int32)),
        context_lengths=guarded(np.array([length], np.int32)),
        block_table=guarded(np.arange(blocks, dtype=np.int32)[None]),
        slots=guarded(np.arange(length - 20, length, dtype=np.int32)),
    )
    query = random((20, heads * key_size), dtype)
    config = kernels.attention_config(batch, query, heads=heads, scale=1.0)
    kernels.write_cache(config, random((20, key_size), dtype), random((20, value_size), dtype), batch.slots)
    kernels.attention(config, query, batch)


def main() -> None:
    library = load_native_library(instruction_set=sys.argv[1], threads=2)
    assert isinstance(library, NativeLibrary)
    kernels = conftest.Kernels(library)
    full = np.full

    def guarded_full(shape: Any, value: Any, dtype: Any) -> Any:
        return guarded(full(shape, value, dtype))

    np.full = guarded_full  # type: ignore[assignment]  # outputs as well
    check_sampling(library)
    for dtype in conftest.DTYPES:
        for check in (check_linear, check_rows):
            print(check.__name__, dtype, flush=True)
            check(kernels, dtype)
        for cache_dtype in {dtype, "int8", "float8_e4m3"}:
            for key_size, value_size in [(64, 64), (20, 12), (7, 5)]:
                print("check_attention", dtype, cache_dtype, key_size, flush=True)
                check_attention(kernels, dtype, cache_dtype, key_size, value_size)
    library.close()
    print("done")


if __name__ == "__main__":
    main()
