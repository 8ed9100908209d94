"""What the cache types make of rows of numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from midspan.errors import SettingsError
from midspan.interface import CACHE_ELEMENT_BYTES, CACHE_SCALE_BYTES, CacheGroup, CacheLayout, packed_block_bytes
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.cached_rows import CACHE_TYPES, CachedRows, rounded

SHAPE = (40, 3, 64)


def rows() -> np.ndarray:
    """Rows of every magnitude, from below the smallest float32 to near the largest."""
    random = np.random.default_rng(8)
    exponents = np.linspace(-140, 126, SHAPE[0])[:, None, None]
    return (random.uniform(-1, 1, SHAPE) * 2.0**exponents).astype(np.float32)


def test_the_interface_states_the_bytes_of_each_type() -> None:
    assert {name: dtype.itemsize for name, dtype in CACHE_TYPES.items()} == dict(CACHE_ELEMENT_BYTES)
    for name in CACHE_TYPES:
        scales = CachedRows.zeros(SHAPE, name).scales
        assert (0 if scales is None else scales.itemsize) == CACHE_SCALE_BYTES.get(name, 0)


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_rows_that_were_read_are_written_as_they_were(dtype: str) -> None:
    first = CachedRows.encode(rows(), dtype)
    again = CachedRows.encode(first.decode(), dtype)
    assert first.data.tobytes() == again.data.tobytes()
    if first.scales is not None:
        assert again.scales is not None
        assert first.scales.tobytes() == again.scales.tobytes()


def test_int8_is_off_by_half_a_step_of_the_rows_own_scale() -> None:
    given = rows()
    largest = np.abs(given).max(axis=-1, keepdims=True)
    # A step is 1/127 of the largest, and the scale's eight bits make it larger by 2^-8 at most.
    allowed = np.where(largest / 127 < 2.0**-126, largest, largest / 254 * (1 + 2.0**-8))
    assert (np.abs(rounded(given, "int8").astype(np.float64) - given) <= allowed).all()
    assert np.array_equal(rounded(-given, "int8"), -rounded(given, "int8"))


def test_int8_numbers_times_their_scale_are_exact_in_float32() -> None:
    stored = CachedRows.encode(rows(), "int8")
    assert stored.scales is not None
    exact = stored.data.astype(np.float64) * stored.scales.astype(np.float64)[..., None]
    assert np.array_equal(stored.decode().astype(np.float64), exact)


def test_a_row_that_is_not_finite_becomes_not_a_number_in_whole_and_no_other_row() -> None:
    given = np.ones((3, 4), np.float32)
    given[0, 1], given[1, 2] = np.nan, -np.inf
    assert np.isnan(rounded(given, "int8")).tolist() == [[True] * 4, [True] * 4, [False] * 4]


def test_float8_rounds_to_nearest_even_saturates_and_keeps_not_a_number() -> None:
    # Steps are 1/8 from 1 on, 32 from 256 on, and 2^-9 below 2^-6.
    given = [1.0625, 1.1875, 1.07, 463.9, 464.0, 1e30, np.inf, -1e9, 2.0**-10, 1.5 * 2.0**-9, 2.6 * 2.0**-9, 0.0]
    wanted = [1.0, 1.25, 1.125, 448, 448, 448, 448, -448, 0, 2.0**-8, 3 * 2.0**-9, 0.0]
    assert rounded(np.array(given, np.float32), "float8_e4m3").tolist() == wanted
    assert np.isnan(rounded(np.array([np.nan], np.float32), "float8_e4m3")).all()
    codes = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    numbers = codes.astype(np.float32)
    assert np.array_equal(rounded(numbers, "float8_e4m3"), numbers, equal_nan=True)


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_a_cache_takes_the_bytes_that_are_planned_and_copies_scales_too(dtype: str) -> None:
    group = CacheGroup(name="full", layers=2, kv_heads=3, key_size=8, value_size=6)
    layout = CacheLayout(groups=(group,), block_size=4, dtype=dtype)
    cache = ReferenceCache(layout, (5,))
    assert cache.memory_bytes() == 5 * packed_block_bytes(layout)[0]
    data = np.random.default_rng(1).standard_normal((2, 2, 1, 4, 3, 8)).astype(np.float32)
    cache.write("full", [2], data)
    cache.copy("full", [(2, 4)])
    found = cache.read("full", [4])
    assert np.array_equal(found[:, 0], rounded(data[:, 0], dtype))
    assert np.array_equal(found[:, 1, ..., :6], rounded(data[:, 1, ..., :6], dtype))


def test_a_type_that_is_not_defined_is_refused_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="float7") as caught:
        CachedRows.zeros(SHAPE, "float7")
    assert "int8" in caught.value.remedy
