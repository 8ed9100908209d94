"""Names for the contents of full blocks, and where blocks of that content are.

A block's key is sha256 over the key of the block before it and its own token ids; the
chain begins with a root made of the salt (and of whatever else the keys and values
depend on). So equal keys mean equal tokens from the first one on, and token ids need no
comparing; tenants with different salts never meet.

It knows nothing of requests' states, reference counts or devices.

Invariants: an index maps each key to one block and each block to one key at most.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

_DOMAIN = b"midspan prefix 1"


def root_key(salt: str | None, extra: Sequence[str] = ()) -> bytes:
    """The key from which a chain starts.

    Args:
        salt: separates tenants; None is not the empty string.
        extra: whatever else the cached values depend on, such as the name of an adapter.

    Returns:
        32 bytes. Each part is written with its length, so no two lists of parts collide.
    """
    digest = sha256(_DOMAIN)
    for part in (salt, *extra):
        if part is None:
            digest.update(b"\x00")
        else:
            text = part.encode("utf-8", "surrogatepass")
            digest.update(b"\x01" + len(text).to_bytes(8, "little") + text)
    return digest.digest()


def extend_keys(keys: list[bytes], token_ids: Sequence[int], *, blocks: int, block_size: int, salt: str | None) -> None:
    """Append keys of full blocks, until there are so many.

    Token ids are written as little-endian unsigned 32-bit numbers, so the keys are the same on
    every machine.

    Args:
        keys: keys of the first blocks; the new ones are appended.
        token_ids: at least ``blocks * block_size`` ids, each in 0 .. 2**32 - 1.
        blocks: how many keys there are to be.
        block_size: tokens per block.
        salt: see ``root_key``.

    Raises:
        OverflowError: a token id is out of that range.
    """
    first = len(keys)
    if first >= blocks:
        return
    numbers = array("I", token_ids[first * block_size : blocks * block_size])
    if sys.byteorder == "big":
        numbers.byteswap()
    content = numbers.tobytes()
    width = block_size * numbers.itemsize
    key = keys[-1] if keys else root_key(salt)
    for start in range(0, len(content), width):
        key = sha256(key + content[start : start + width]).digest()
        keys.append(key)


class PrefixIndex:
    """Which block of one cache group holds which content."""

    __slots__ = ("_block_of", "_key_of")

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def find(self, key: bytes) -> int:
        """The block of that content; 0, the padding block, when there is none."""
        return self._block_of.get(key, 0)

    def find_run(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the first keys, up to the first that is not here."""
        get = self._block_of.get
        blocks: list[int] = []
        for key in keys:
            block = get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def add(self, key: bytes, block: int) -> None:
        """Remember a block; a second block of the same content is not remembered."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, block: int) -> None:
        """The block is about to hold something else."""
        del self._block_of[self._key_of.pop(block)]

    def faults(self) -> list[str]:
        """Broken invariants, in words."""
        wrong = [f"block {block} has a key that leads elsewhere" for block, key in self._key_of.items()
                 if self._block_of.get(key) != block]  # fmt: skip
        if len(self._key_of) != len(self._block_of):
            wrong.append(f"{len(self._block_of)} keys but {len(self._key_of)} blocks")
        return wrong
