"""The torch runtime's cache types are the definitions', number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from midspan.runtimes.reference.cached_rows import CACHE_TYPES
from midspan.runtimes.reference.cached_rows import CachedRows as DefinedRows
from midspan.runtimes.torch.cached_rows import CachedRows

BLOCKS, KV_HEADS, BLOCK_SIZE, SIZE = 30, 2, 16, 48


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_rows_become_what_the_definition_makes_of_them(dtype: str, transposed: bool) -> None:
    random = np.random.default_rng(4)
    exponents = np.linspace(-140, 126, BLOCKS)[:, None, None, None]
    given = random.uniform(-1, 1, (BLOCKS, KV_HEADS, BLOCK_SIZE, SIZE)) * 2.0**exponents
    given[1, 0, 3, 5], given[2, 1, 3, 5], given[3, 0, 0] = np.nan, np.inf, 0.0
    rows = given.astype(np.float32)
    held = CachedRows.allocate(dtype, BLOCKS, KV_HEADS, BLOCK_SIZE, SIZE, torch.device("cpu"), transposed=transposed)
    order = torch.from_numpy(random.permutation(BLOCKS))
    held.put(order, torch.from_numpy(rows)[order])
    with np.errstate(over="ignore"):
        wanted = DefinedRows.encode(rows, dtype).decode()
    assert np.array_equal(held.blocks(torch.arange(BLOCKS)).numpy(), wanted, equal_nan=True)
    held.copy(torch.tensor([1, 2]), torch.tensor([2, 7]))
    assert np.array_equal(held.blocks(torch.tensor([2, 7])).numpy(), wanted[[1, 2]], equal_nan=True)
