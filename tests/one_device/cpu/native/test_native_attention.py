"""Paged attention: against the definition, and each token's bits whatever the company and the chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from midspan.runtimes.reference.attention import attention as defined_attention
from midspan.runtimes.reference.cached_rows import CACHE_TYPES, CachedRows

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}


@dataclass
class DefinedCache:
    """The cache as the definition wants it."""

    keys: Any
    values: Any

    def layer(self, group: str, layer: int) -> tuple[Any, Any]:
        return self.keys, self.values


@dataclass(kw_only=True)
class Case:
    """A layer, requests as (context length, new tokens), and what their tokens hold."""

    requests: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    key_size: int = 32
    value_size: int = 32
    block_size: int = 16
    dtype: str = "float32"
    cache_dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


class Layer:
    """A case with its blocks handed out in random order, and everything written but not yet attended."""

    def __init__(self, kernels: Any, conftest: Any, rng: np.random.Generator, case: Case) -> None:
        self.kernels, self.case = kernels, case
        lengths = [length for length, _ in case.requests]
        counts = [-(-length // case.block_size) for length in lengths]
        blocks = sum(counts) + 3
        order = iter(rng.permutation(np.arange(1, blocks)))
        width = max(counts) + 1
        self.table = np.zeros((len(lengths), width), np.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = [next(order) for _ in range(count)]
        sizes = (case.heads * case.key_size, case.kv_heads * case.key_size, case.kv_heads * case.value_size)
        self.query, self.key, self.value = (
            [rng.standard_normal((length, size)).astype(DTYPES[case.dtype]) for length in lengths] for size in sizes
        )
        self.keys = self.side(conftest, blocks, case.key_size, case.block_size)
        self.values = self.side(conftest, blocks, case.block_size, case.value_size)
        self.key_cache, self.value_cache = self.keys.data, self.values.data
        self.cache_batch = conftest.CacheBatch

    def side(self, conftest: Any, blocks: int, rows: int, columns: int) -> CachedRows:
        """Keys or values as they lie in memory, all of them NaN."""
        case, cached = self.case, CACHE_TYPES[self.case.cache_dtype]
        scaled = case.cache_dtype == "int8"
        shape = (blocks, case.kv_heads, rows * columns + (2 * case.block_size if scaled else 0))
        memory = conftest.aligned_bytes(int(np.prod(shape)) * cached.itemsize).view(cached).reshape(shape)
        if not scaled:
            memory[:] = np.nan
            return CachedRows(data=conftest.cache_numbers(memory, rows, columns))
        scales = conftest.cache_scales(memory, case.block_size)
        scales[:] = np.nan
        return CachedRows(data=conftest.cache_numbers(memory, rows, columns), scales=scales)

    def slots(self, request: int, begin: int, end: int) -> Any:
        positions = np.arange(begin, end)
        size = self.case.block_size
        return (self.table[request, positions // size] * size + positions % size).astype(np.int32)

    def batch(self, spans: list[tuple[int, int, int]]) -> Any:
        """The step in which each (request, begin, end) has its tokens in [begin, end) as new ones."""
        starts = np.cumsum([0, *(end - begin for _, begin, end in spans)]).astype(np.int32)
        return self.cache_batch(
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            query_starts=starts,
            context_lengths=np.array([end for _, _, end in spans], np.int32),
            block_table=np.ascontiguousarray(self.table[[request for request, _, _ in spans]]),
            slots=np.concatenate([self.slots(*span) for span in spans]),
        )

    def rows(self, arrays: list[Any], spans: list[tuple[int, int, int]]) -> Any:
        return np.concatenate([arrays[request][begin:end] for request, begin, end in spans])

    def step(self, spans: list[tuple[int, int, int]]) -> Any:
        """Write and attend, natively."""
        batch, query = self.batch(spans), self.rows(self.query, spans)
        config = self.kernels.attention_config(
            batch, query, heads=self.case.heads, scale=self.case.key_size**-0.5, **self.case.options
        )
        self.kernels.write_cache(config, self.rows(self.key, spans), self.rows(self.value, spans), batch.slots)
        return self.kernels.attention(config, query, batch)

    def defined_step(self, spans: list[tuple[int, int, int]]) -> Any:
        """The same by the definition, on float32 copies."""
        batch, case, options = self.batch(spans), self.case, self.case.options
        keys, values = defined_rows(self.keys, (0, 3, 1, 2)), defined_rows(self.values, (0, 2, 1, 3))
        slopes = options.get("alibi_slopes")
        return defined_attention(
            self.rows(self.query, spans).astype(np.float32),
            self.rows(self.key, spans),
            self.rows(self.value, spans),
            batch.query_starts,
            batch.context_lengths,
            batch.block_table,
            batch.slots,
            DefinedCache(keys, values),
            sinks=options.get("sinks"),
            group="full",
            layer=0,
            heads=case.heads,
            kv_heads=case.kv_heads,
            key_size=case.key_size,
            value_size=case.value_size,
            scale=case.key_size**-0.5,
            window=options.get("window") or None,
            soft_cap=options.get("soft_cap") or None,
            alibi_slopes=None if slopes is None else tuple(map(float, slopes)),
        )


def defined_rows(rows: CachedRows, axes: tuple[int, ...]) -> CachedRows:
    """A copy [blocks, block_size, kv_heads, size]."""
    scales = None if rows.scales is None else np.ascontiguousarray(rows.scales.transpose(0, 2, 1))
    return CachedRows(data=np.ascontiguousarray(rows.data.transpose(axes)), scales=scales)


@pytest.fixture
def make_layer(kernels: Any, rng: np.random.Generator, request: pytest.FixtureRequest) -> Any:
    """Layers on this test's kernels."""
    helper = request.getfixturevalue("native_arrays")

    def make(**fields: Any) -> Layer:
        return Layer(kernels, helper, rng, Case(**fields))

    return make


def check_against_definition(layer: Layer) -> None:
    case = layer.case
    before = [(index, 0, length - new) for index, (length, new) in enumerate(case.requests) if length > new]
    if before:
        layer.step(before)
    spans = [(index, length - new, length) for index, (length, new) in enumerate(case.requests)]
    out = layer.step(spans)
    expected = layer.defined_step(spans)
    # Weights are right to about (key_size + 8) * 2^-24 of the scores' size (here below 16), values are below 6;
    # then the output is rounded once. (8 bits add up to 2^-4 of both: below 8 in all.)
    allowed = 16 * (case.key_size + 8) * 2**-24 + UNIT[case.dtype] * np.abs(expected)
    assert (np.abs(out.astype(np.float64) - expected) <= allowed).all()


@pytest.mark.parametrize("cache_dtype", CACHE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_defined_for_prefill_chunks_and_decode_in_one_call(
    make_layer: Any, dtype: str, cache_dtype: str
) -> None:
    requests = [(1, 1), (40, 40), (70, 1), (300, 13), (64, 64), (600, 1)]
    check_against_definition(make_layer(requests=requests, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (9, 3), (8, 1), (5, 1), (64, 1), (14, 2)])
def test_attention_shares_kv_heads_in_groups_of_any_size(make_layer: Any, heads: int, kv_heads: int) -> None:
    check_against_definition(make_layer(requests=[(90, 20), (33, 1)], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(("key_size", "value_size"), [(8, 8), (64, 64), (80, 80), (128, 128), (192, 128), (20, 12)])
@pytest.mark.parametrize(
    ("block_size", "cache_dtype"), [(16, "int8"), (16, "float32"), (48, "float8_e4m3"), (128, "int8")]
)
def test_attention_takes_heads_and_blocks_of_many_sizes(
    make_layer: Any, key_size: int, value_size: int, block_size: int, cache_dtype: str
) -> None:
    sizes = {"key_size": key_size, "value_size": value_size, "block_size": block_size}
    layer = make_layer(requests=[(150, 30), (77, 1)], cache_dtype=cache_dtype, **sizes)
    check_against_definition(layer)


SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
SINKS = np.array([-1.0, 0.0, 2.0, 30.0], np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 16},
        {"window": 100},
        {"window": 256},
        {"soft_cap": 2.0},
        {"alibi_slopes": SLOPES},
        {"sinks": SINKS},
        {"window": 70, "soft_cap": 5.0, "alibi_slopes": SLOPES, "sinks": SINKS},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("cache_dtype", ["float32", "int8", "float8_e4m3"])
def test_attention_honours_its_options(make_layer: Any, options: dict[str, Any], cache_dtype: str) -> None:
    requests = [(400, 150), (520, 1), (30, 30)]
    check_against_definition(make_layer(requests=requests, options=options, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8", "float8_e4m3"])
@pytest.mark.parametrize("options", [{}, {"window": 90}], ids=["full", "window"])
def test_a_token_has_the_same_bits_in_prefill_in_chunks_and_in_decode(
    make_layer: Any, options: dict[str, Any], cache_dtype: str
) -> None:
    layer = make_layer(
        requests=[(700, 700), (300, 300), (1300, 1)],
        heads=6,
        kv_heads=2,
        dtype="bfloat16",
        cache_dtype=cache_dtype,
        options=options,
    )
    layer.step([(1, 0, 300), (2, 0, 1299)])
    whole = layer.step([(0, 0, 700)])
    size = 0
    pieces = []
    for length in [1, 5, 100, 64, 250, 279, 1]:
        neighbours = [(1, 299, 300), (2, 1200, 1299)] if length > 50 else []
        pieces.append(layer.step([(0, size, size + length), *neighbours])[:length])
        size += length
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    decoded = np.concatenate([layer.step([(0, at, at + 1)]) for at in range(0, 700, 7)])
    assert decoded.tobytes() == whole[::7].tobytes()
    assert layer.step([(2, 1298, 1299), (0, 699, 700)])[1:].tobytes() == whole[699:].tobytes()


@pytest.mark.parametrize("cache_dtype", CACHE_TYPES)
def test_attention_does_not_look_at_blocks_before_the_window_or_after_the_context(
    make_layer: Any, cache_dtype: str
) -> None:
    layer = make_layer(requests=[(333, 1)], options={"window": 40}, cache_dtype=cache_dtype)
    layer.step([(0, 0, 333)])
    expected = layer.step([(0, 332, 333)])
    layer.table[0, : (333 - 40) // 16] = 0  # the padding block, full of NaN
    out = layer.step([(0, 332, 333)])
    assert np.isfinite(out).all()
    assert out.tobytes() == expected.tobytes()


def test_a_block_outside_the_cache_is_refused(make_layer: Any) -> None:
    layer = make_layer(requests=[(40, 40)])
    layer.step([(0, 0, 40)])
    layer.table[0, 1] = 10_000
    batch, query = layer.batch([(0, 39, 40)]), layer.query[0][39:40]
    config = layer.kernels.attention_config(batch, query, heads=4, scale=1.0)
    with pytest.raises(Exception, match="block number outside"):
        layer.kernels.attention(config, query, batch)
    with pytest.raises(Exception, match="slot"):
        layer.kernels.write_cache(config, layer.key[0][:1], layer.value[0][:1], np.array([-1], np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3", "int8"])
def test_tokens_of_any_size_are_written_as_the_cache_type_is_defined(
    make_layer: Any, dtype: str, cache_dtype: str
) -> None:
    """From below the smallest number of each type to beyond its largest, and what is no number."""
    layer = make_layer(requests=[(300, 300)], dtype=dtype, cache_dtype=cache_dtype, key_size=37, value_size=64)
    exponents = np.linspace(-140, 127, 300)[:, None]
    for rows in (layer.key[0], layer.value[0]):
        with np.errstate(over="ignore"):
            rows[:] = (rows.astype(np.float64) * 2.0**exponents).astype(DTYPES[dtype])
        rows[7, 3], rows[9, 5], rows[11], rows[13, 1] = np.nan, np.inf, 0.0, -np.inf
    layer.step([(0, 0, 300)])
    slots = layer.slots(0, 0, 300)
    sides = ((layer.keys, (0, 3, 1, 2), layer.key[0]), (layer.values, (0, 2, 1, 3), layer.value[0]))
    for stored, axes, rows in sides:
        found = defined_rows(stored, axes).by_slot()[slots]
        wanted = CachedRows.encode(rows.reshape(300, 2, -1), cache_dtype)
        assert np.array_equal(found.decode(), wanted.decode(), equal_nan=True)


def test_every_float8_number_is_read_as_it_is_defined(make_layer: Any) -> None:
    """One token attends to itself alone, so that its value comes out; NaN too."""
    layer = make_layer(requests=[(1, 1)] * 128, cache_dtype="float8_e4m3", value_size=2, heads=2, kv_heads=1)
    spans = [(request, 0, 1) for request in range(128)]
    layer.step(spans)
    codes = np.arange(256, dtype=np.uint8).reshape(128, 2)
    for request in range(128):
        layer.value_cache[layer.table[request, 0], 0, 0] = codes[request].view(layer.value_cache.dtype)
    batch, query = layer.batch(spans), layer.rows(layer.query, spans)
    config = layer.kernels.attention_config(batch, query, heads=2, scale=1.0)
    out = layer.kernels.attention(config, query, batch)
    wanted = codes.view(layer.value_cache.dtype).astype(np.float32)
    assert np.array_equal(out.reshape(128, 2, 2)[:, 0], wanted, equal_nan=True)
    assert np.array_equal(out.reshape(128, 2, 2)[:, 1], wanted, equal_nan=True)
