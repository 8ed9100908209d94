"""The KV cache in every claimed block size and element type: blocks come out as they went in.

Canonical data is what the reference's cache gives and takes, so that a request can move
between any two devices. Misuse runs in a process of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from midspan.conformance.attention_cases import SHAPES, make_case
from midspan.conformance.case_fitting import fitting
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.child_steps import SECONDS, run_steps, step
from midspan.conformance.children.cache_misuse import STEPS
from midspan.conformance.levels.operations import unknown_cache_type
from midspan.conformance.operation_case import CacheContent
from midspan.conformance.operation_run import Setting, require_agreement
from midspan.conformance.random_values import grid
from midspan.conformance.subject import Subject
from midspan.devices.contract import check_block_bytes, check_cache
from midspan.interface import PADDING_BLOCK, Cache, CacheGroup, CacheLayout
from midspan.runtimes.reference.cache import ReferenceCache
from midspan.runtimes.reference.cached_rows import CACHE_TYPES, rounded

LEVEL = "caches"

GROUPS = (
    CacheGroup(name="full", layers=2, kv_heads=2, key_size=32, value_size=32),
    CacheGroup(name="window.8", layers=1, kv_heads=3, key_size=48, value_size=32, window=8),
    CacheGroup(name="wide", layers=1, kv_heads=1, key_size=16, value_size=24),
)
"""Several groups at once, of different shapes; keys wider than values, and values wider than keys."""
BLOCKS = (9, 6, 7)

PAGE_BYTES = 4096
ROUNDING = 0.01
"""An array may be rounded up to a page, and all of them by this share."""

Float32 = NDArray[np.float32]


def checks(subject: Subject) -> Sequence[Check]:
    """The level's checks."""
    claims = subject.capabilities
    found: list[Check] = []
    for dtype in claims.cache_dtypes:
        unknown = unknown_cache_type(dtype)
        for size in claims.block_sizes:
            layout = CacheLayout(groups=GROUPS, block_size=size, dtype=dtype)
            quick = dtype == claims.cache_dtypes[0] and size == claims.block_sizes[0]
            parts: Mapping[str, Callable[[Subject, CacheLayout], None]] = {
                "write-and-read": _write_and_read,
                "copies-on-the-host": _host_copies,
                "copy": _copy,
                "padding-block": _padding_block,
                "sizes": _sizes,
            }
            for name, part in parts.items():
                found.append(_check(f"{name}-{dtype}-blocks-{size}", functools.partial(part, subject, layout), quick))
            compared = {"migration": _migration, "attention-after-migration": _attention}
            for name, part in compared.items():
                run = functools.partial(part, subject, layout)
                found.append(_check(f"{name}-{dtype}-blocks-{size}", run, quick, unknown))
    outcomes = functools.cache(lambda: run_steps(subject, "cache_misuse", list(STEPS)))
    waits = SECONDS * len(STEPS)
    for name in STEPS:
        run = functools.partial(step, name, outcomes)
        found.append(Check(level=LEVEL, name=name, run=run, quick=True, waits_seconds=waits))
    return found


def _check(name: str, run: Callable[[], None], quick: bool, unclaimed: str | None = None) -> Check:
    return Check(level=LEVEL, name=name, run=run, quick=quick, unclaimed=unclaimed)


@contextmanager
def _allocated(subject: Subject, layout: CacheLayout, blocks: tuple[int, ...] = BLOCKS) -> Iterator[Cache]:
    cache = subject.device().allocate_cache(layout, blocks)
    try:
        check_cache(cache, subject.plugin, layout, blocks)
        yield cache
    finally:
        cache.close()


def _canonical(group: CacheGroup, blocks: int, layout: CacheLayout, random: np.random.Generator) -> Float32:
    """Random content of blocks, exact in the cache's type; zeros where the narrower of key and value ends."""
    width = max(group.key_size, group.value_size)
    data = grid(random, (group.layers, 2, blocks, layout.block_size, group.kv_heads, width))
    data[:, 0, ..., group.key_size :] = 0.0
    data[:, 1, ..., group.value_size :] = 0.0
    return rounded(data, layout.dtype) if layout.dtype in CACHE_TYPES else data


def _filled(cache: Cache, random: np.random.Generator) -> dict[str, Float32]:
    """Write all blocks but the padding block, out of order; returns what they hold, block by block."""
    held = {}
    for group, count in zip(cache.layout.groups, cache.blocks, strict=True):
        data = _canonical(group, count, cache.layout, random)
        order = [int(block) for block in 1 + random.permutation(count - 1)]
        cache.write(group.name, order, data[:, :, order])
        held[group.name] = data
    return held


def _require(cache: Cache, held: Mapping[str, Float32], what: str) -> None:
    """All blocks but the padding block hold what they must."""
    for group, count in zip(cache.layout.groups, cache.blocks, strict=True):
        blocks = list(range(1, count))
        _require_equal(cache.read(group.name, blocks), held[group.name][:, :, blocks], f"{what}: group '{group.name}'")


def _require_equal(found: Float32, wanted: Float32, what: str) -> None:
    if found.dtype != np.float32:
        raise CheckFailed(f"{what} is read as {found.dtype}, not as float32")
    if found.shape != wanted.shape:
        raise CheckFailed(f"{what} is read in the shape {found.shape}, not {wanted.shape}")
    if np.array_equal(found, wanted):
        return
    place = tuple(int(index) for index in np.argwhere(~(found == wanted))[0])
    side = ("key", "value")[place[1]]
    raise CheckFailed(
        f"{what}: {int((found != wanted).sum())} of {found.size} numbers differ; the first, of a {side} in layer "
        f"{place[0]}, block {place[2]} of those read, token {place[3]}, head {place[4]}, column {place[5]}, is "
        f"{found[place]:g} instead of {wanted[place]:g}"
    )


def _write_and_read(subject: Subject, layout: CacheLayout) -> None:
    random = np.random.default_rng(1)
    with _allocated(subject, layout) as cache:
        held = _filled(cache, random)
        _require(cache, held, "what was written")
        for group, count in zip(layout.groups, BLOCKS, strict=True):
            name, data = group.name, held[group.name]
            backwards = list(range(count - 1, 0, -1))
            _require_equal(cache.read(name, backwards), data[:, :, backwards], f"group '{name}' read backwards")
            _require_equal(cache.read(name, []), data[:, :, :0], f"no block of group '{name}'")
            cache.write(name, [], data[:, :, :0])
            wide = np.repeat(_canonical(group, 2, layout, random), 2, axis=-1)
            data[:, :, [2, 4]] = wide[..., ::2]
            cache.write(name, [2, 4], wide[..., ::2])
            _require(cache, held, f"after two blocks of '{name}' were written again")
        with _allocated(subject, layout) as other:
            _filled(other, random)
            _require(cache, held, "after another cache was filled")
        _require(cache, held, "after another cache was closed")


def _host_copies(subject: Subject, layout: CacheLayout) -> None:
    """What was read belongs to the reader, what was given to be written to the giver: the cache keeps neither."""
    random = np.random.default_rng(6)
    with _allocated(subject, layout) as cache:
        _filled(cache, random)
        for group in layout.groups:
            first = cache.read(group.name, [1, 2])
            kept = first.copy()
            cache.read(group.name, [3, 4])
            if not np.array_equal(first, kept):
                raise CheckFailed(f"what was read of group '{group.name}' changed when other blocks were read")
            if first.flags.writeable:
                first[...] = -first - 1
            if not np.array_equal(cache.read(group.name, [1, 2]), kept):
                raise CheckFailed(f"blocks of group '{group.name}' changed when the array that was read was written to")
            data = _canonical(group, 2, layout, random)
            cache.write(group.name, [1, 2], data)
            written = cache.read(group.name, [1, 2]).copy()
            data[...] = -data - 1
            if not np.array_equal(cache.read(group.name, [1, 2]), written):
                raise CheckFailed(f"blocks of group '{group.name}' changed with the array that they were written from")


def _copy(subject: Subject, layout: CacheLayout) -> None:
    random = np.random.default_rng(2)
    several = [[(1, 2), (2, 3)], [(1, 2), (2, 1)], [(3, 4), (3, 5)], [(5, 5)], []]
    with _allocated(subject, layout) as cache:
        held = _filled(cache, random)
        for group in layout.groups:
            for pairs in several:
                before = held[group.name].copy()
                for source, target in pairs:
                    held[group.name][:, :, target] = before[:, :, source]
                cache.copy(group.name, pairs)
                _require(cache, held, f"after the copies {pairs} in '{group.name}', all read before any is written")


def _padding_block(subject: Subject, layout: CacheLayout) -> None:
    """It may hold anything, and what is done to it reaches no other block."""
    random = np.random.default_rng(3)
    with _allocated(subject, layout) as cache:
        held = _filled(cache, random)
        for group in layout.groups:
            data = _canonical(group, 1, layout, random)
            cache.write(group.name, [PADDING_BLOCK], data)
            if cache.read(group.name, [PADDING_BLOCK]).shape != data.shape:
                raise CheckFailed(f"the padding block of group '{group.name}' is read in another shape than others")
            _require(cache, held, f"after the padding block of '{group.name}' was written")


def _sizes(subject: Subject, layout: CacheLayout) -> None:
    """``block_bytes`` is what the core plans with, ``memory_bytes`` what a cache says that it takes."""
    sizes = check_block_bytes(subject.device().block_bytes(layout), subject.plugin, layout)
    pages = sum(2 * PAGE_BYTES * group.layers for group in layout.groups)
    for factor in (1, 8):
        blocks = tuple(count * factor for count in BLOCKS)
        planned = sum(count * size for count, size in zip(blocks, sizes, strict=True))
        with _allocated(subject, layout, blocks) as cache:
            taken = cache.memory_bytes()
        if abs(taken - planned) > pages + ROUNDING * planned:
            raise CheckFailed(
                f"a cache of {blocks} blocks has memory_bytes() of {taken}; by block_bytes() it is {planned}"
            )


def _migration(subject: Subject, layout: CacheLayout) -> None:
    """From the reference to the device and back, block numbers changing on the way."""
    random = np.random.default_rng(4)
    home, back = ReferenceCache(layout, BLOCKS), ReferenceCache(layout, BLOCKS)
    held = _filled(home, random)
    with _allocated(subject, layout) as cache:
        for group, count in zip(layout.groups, BLOCKS, strict=True):
            blocks = list(range(1, count))
            elsewhere = [int(block) for block in 1 + random.permutation(count - 1)]
            cache.write(group.name, elsewhere, home.read(group.name, blocks))
            back.write(group.name, blocks, cache.read(group.name, elsewhere))
    _require(back, held, "from the reference to the device and back")


def _attention(subject: Subject, layout: CacheLayout) -> None:
    """Attention over blocks that came from the reference gives what it gives there."""
    device = subject.device()
    setting = Setting(dtype=device.capabilities.dtypes[0], cache_dtype=layout.dtype, block_size=layout.block_size)
    names = ("a ragged batch", "one decode", "first token")
    made = [make_case(name, SHAPES[name], layout.block_size, np.random.default_rng(5)) for name in names]
    fitted = fitting(made, device.capabilities)
    if not fitted:
        raise CheckFailed("no request fits the limits that the device claims")
    for case in fitted:
        if case.cache is not None:
            content = case.cache
            reference = ReferenceCache(content.layout(layout.dtype), (content.blocks,))
            reference.write(content.group.name, range(content.blocks), np.nan_to_num(content.data))
            data = reference.read(content.group.name, range(content.blocks))
            moved = CacheContent(group=content.group, block_size=content.block_size, blocks=content.blocks, data=data)
            require_agreement(device, replace(case, cache=moved), setting)
