"""What must raise and may not crash: closed caches, blocks and groups that do not exist, data of another shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from midspan.conformance.check import CheckFailed
from midspan.conformance.child_process import answer
from midspan.conformance.child_steps import Steps, take_steps
from midspan.conformance.subject import Subject
from midspan.errors import MidspanError
from midspan.interface import Cache, CacheGroup, CacheLayout, Device

GROUP = CacheGroup(name="full", layers=1, kv_heads=1, key_size=32, value_size=32)
BLOCKS = 5


def _allocate(device: Device) -> Cache:
    claims = device.capabilities
    layout = CacheLayout(groups=(GROUP,), block_size=claims.block_sizes[0], dtype=claims.cache_dtypes[0])
    return device.allocate_cache(layout, (BLOCKS,))


def _data(cache: Cache, blocks: int) -> Any:
    shape = (GROUP.layers, 2, blocks, cache.layout.block_size, GROUP.kv_heads, GROUP.key_size)
    return np.ones(shape, np.float32)


def _require_raises(what: str, call: Callable[[], object], *kinds: type[Exception]) -> None:
    try:
        call()
    except kinds:
        return
    except Exception as error:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise CheckFailed(f"{what} must raise {wanted} and raised {type(error).__name__}: {error}") from error
    raise CheckFailed(f"{what} must raise, and passed without a word")


def _closed(subject: Subject) -> None:
    with subject.open() as device:
        cache = _allocate(device)
        data = _data(cache, 1)
        cache.close()
        _require_raises("reading a closed cache", lambda: cache.read("full", [1]), Exception)
        _require_raises("writing to a closed cache", lambda: cache.write("full", [1], data), Exception)
        _require_raises("copying in a closed cache", lambda: cache.copy("full", [(1, 2)]), Exception)


def _closed_twice(subject: Subject) -> None:
    with subject.open() as device:
        cache = _allocate(device)
        cache.close()
        cache.close()


def _no_such_block(subject: Subject) -> None:
    with subject.open() as device:
        cache = _allocate(device)
        for block in (BLOCKS, -1, 1 << 40):
            misuses: Mapping[str, Callable[[], object]] = {
                "reading": functools.partial(cache.read, "full", [block]),
                "writing": functools.partial(cache.write, "full", [block], _data(cache, 1)),
                "copying from": functools.partial(cache.copy, "full", [(block, 1)]),
                "copying to": functools.partial(cache.copy, "full", [(1, block)]),
            }
            for what, misuse in misuses.items():
                _require_raises(f"{what} block {block}", misuse, IndexError, MidspanError)
        cache.close()


def _no_such_group(subject: Subject) -> None:
    with subject.open() as device:
        cache = _allocate(device)
        data, kinds = _data(cache, 1), (LookupError, MidspanError)
        _require_raises("reading a group that does not exist", lambda: cache.read("other", [1]), *kinds)
        _require_raises("writing to a group that does not exist", lambda: cache.write("other", [1], data), *kinds)
        _require_raises("copying in a group that does not exist", lambda: cache.copy("other", [(1, 2)]), *kinds)
        cache.close()


def _wrong_shape(subject: Subject) -> None:
    with subject.open() as device:
        cache = _allocate(device)
        narrow = _data(cache, 2)[..., :1]
        _require_raises("writing data of one column", lambda: cache.write("full", [1, 2], narrow), Exception)
        fewer = _data(cache, 1)
        _require_raises("writing one block's data to two blocks", lambda: cache.write("full", [1, 2], fewer), Exception)
        cache.close()


STEPS: Steps = {
    "closed-cache-raises": _closed,
    "closes-twice": _closed_twice,
    "block-that-does-not-exist-raises": _no_such_block,
    "group-that-does-not-exist-raises": _no_such_group,
    "data-of-another-shape-raises": _wrong_shape,
}
"""Name of the check -> what it does."""


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the steps that the parent asks for."""
    return take_steps(STEPS, arguments)


if __name__ == "__main__":
    answer(main)
