"""Rows of keys or values as a cache keeps them: the definition of each cache type.

A row is one token's key or value of one kv head, along the last axis. What a row
becomes stands in ``interface.cache.CacheLayout``. Knows neither blocks nor requests.

Invariants: encoding what was decoded gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from midspan.errors import SettingsError
from midspan.runtimes.reference.element_types import ELEMENT_TYPES

Array = NDArray[Any]
Float32 = NDArray[np.float32]

CACHE_TYPES: Mapping[str, np.dtype[Any]] = {
    **ELEMENT_TYPES,
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
}
"""Defined cache types, and the numpy type of their numbers."""

FLOAT8_LARGEST = 448.0
INT8_LARGEST = 127.0
SMALLEST_SCALE = 2.0**-126

_SCALE_TYPE = np.dtype(ml_dtypes.bfloat16)
_SCALED = np.dtype(np.int8)
_SATURATED = CACHE_TYPES["float8_e4m3"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedRows:
    """Rows in a cache type.

    Attributes:
        data: [..., size], in a type of ``CACHE_TYPES``.
        scales: bfloat16 [...] where the type has scales, else None.
    """

    data: Array
    scales: Array | None = None

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str) -> CachedRows:
        """Rows of zeros; memory is taken when it is written to.

        Raises:
            SettingsError: the type is not defined; the message lists those that are.
        """
        element = cache_type(dtype)
        scales = np.zeros(shape[:-1], _SCALE_TYPE) if element == _SCALED else None
        return cls(data=np.zeros(shape, element), scales=scales)

    @classmethod
    def encode(cls, rows: Array, dtype: str) -> CachedRows:
        """Rows of numbers [..., size], brought to a cache type."""
        return _encoded(rows, cache_type(dtype))

    def decode(self) -> Float32:
        """The rows as float32 [..., size], a new array."""
        wide = self.data.astype(np.float32)
        return wide if self.scales is None else wide * self.scales.astype(np.float32)[..., np.newaxis]

    def __getitem__(self, index: Any) -> CachedRows:
        """Some of the rows; a view where numpy gives one."""
        return CachedRows(data=self.data[index], scales=None if self.scales is None else self.scales[index])

    def put(self, index: Any, rows: Array) -> None:
        """Write numbers over some rows."""
        new = _encoded(rows, self.data.dtype)
        self.data[index] = new.data
        if self.scales is not None and new.scales is not None:
            self.scales[index] = new.scales

    def by_slot(self) -> CachedRows:
        """A view [blocks * block_size, kv_heads, size] of rows [blocks, block_size, kv_heads, size]."""
        scales = None if self.scales is None else self.scales.reshape(-1, self.scales.shape[-1])
        return CachedRows(data=self.data.reshape(-1, *self.data.shape[2:]), scales=scales)

    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def cache_type(name: str) -> np.dtype[Any]:
    """The numpy type of a cache type's numbers.

    Raises:
        SettingsError: it is not defined; the message lists those that are.
    """
    if name not in CACHE_TYPES:
        raise SettingsError(
            f"The reference has no cache type '{name}'.", remedy=f"Known types: {', '.join(CACHE_TYPES)}."
        )
    return CACHE_TYPES[name]


def rounded(rows: Array, dtype: str) -> Float32:
    """What a cache of a defined type gives back of rows [..., size]."""
    return CachedRows.encode(rows, dtype).decode()


def _encoded(rows: Array, element: np.dtype[Any]) -> CachedRows:
    if element == _SCALED:
        return _with_scales(rows.astype(np.float32))
    if element == _SATURATED:
        rows = np.clip(rows.astype(np.float32), -FLOAT8_LARGEST, FLOAT8_LARGEST)
    return CachedRows(data=rows.astype(element, copy=False))


def _with_scales(rows: Float32) -> CachedRows:
    with np.errstate(all="ignore"):  # rows that were never written hold anything
        largest = np.abs(rows).max(axis=-1, initial=0.0)
        scales = (largest / np.float32(INT8_LARGEST)).astype(_SCALE_TYPE)
        scales = np.where(np.isfinite(largest), scales, np.asarray(np.nan, _SCALE_TYPE))
        scales = np.where(scales < SMALLEST_SCALE, np.asarray(0, _SCALE_TYPE), scales)
        whole = np.rint(rows / scales.astype(np.float32)[..., np.newaxis])
    return CachedRows(data=np.nan_to_num(whole, nan=0.0, posinf=0.0, neginf=0.0).astype(np.int8), scales=scales)
