"""Collectives over TCP: right on every device, and no faster than the host and its network.

What a device has until it has its own: arrays cross to the host, are added in numpy, and
cross back. Knows the device's arrays only as an ``ArrayLibrary`` says.

Invariants: a sum is taken by one rank for all, in the order of ranks whatever came first, in
float32 for narrower types and rounded once, so that every rank gets the same bits; after an
error the group is left, so that no other rank waits for this one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import DeviceLost, MidspanError
from midspan.interface.collectives import DeviceGroup
from midspan.runtimes.reference.array_library import HOST_ARRAYS, ArrayLibrary
from midspan.runtimes.reference.socket_frames import FRAME_TYPES, Transfer
from midspan.runtimes.reference.socket_group import form_group

Array = NDArray[Any]

_ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL, _SEND, _BROADCAST = range(1, 7)


class SocketCollectives:
    """Implements ``interface.collectives.Collectives``; forms the group when it is made.

    Args:
        group: this rank's place.
        arrays: how arrays cross between host and device.

    Raises:
        SettingsError: the group's settings cannot be right, or contradict another member's.
        DeviceLost: the others did not come in time.
    """

    def __init__(self, group: DeviceGroup, *, arrays: ArrayLibrary = HOST_ARRAYS) -> None:
        self.rank = group.rank
        self.world_size = group.world_size
        self._patience = group.timeout_seconds
        self._arrays = arrays
        self._turn = threading.Lock()
        self._closed = False
        self._peers = form_group(group)

    def to_device(self, array: Array) -> Any:
        """A host array as one of the device's."""
        return self._arrays.to_device(array)

    def to_host(self, array: Any) -> Array:
        """One of the device's arrays on the host."""
        return self._arrays.to_host(array)

    def all_reduce(self, array: Any) -> Any:
        """Sum over all ranks, same shape: each rank adds its share, then all get all shares."""
        own = self.to_host(array)
        flat = np.ascontiguousarray(own).reshape(-1)
        share = self._summed(np.array_split(flat, self.world_size), _ALL_REDUCE)
        shares = self._to_all(share, _ALL_REDUCE)
        return self.to_device(np.concatenate(shares).reshape(own.shape))

    def all_gather(self, array: Any, axis: int) -> Any:
        """Every rank's array, joined along an axis by rank; their sizes along it may differ."""
        own = self.to_host(array)
        place = _axis(axis, own)
        parts = self._to_all(own, _ALL_GATHER)
        for rank, part in enumerate(parts):
            self._agree(rank, part, own, apart_from=place)
        return self.to_device(np.concatenate(parts, axis=place))

    def reduce_scatter(self, array: Any, axis: int) -> Any:
        """Sum over all ranks; each keeps its share along an axis."""
        own = self.to_host(array)
        shares = np.array_split(own, self.world_size, axis=_axis(axis, own))
        return self.to_device(self._summed(shares, _REDUCE_SCATTER))

    def all_to_all(self, array: Any, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
        """Exchange rows by rank, see ``Collectives``."""
        own = self.to_host(array)
        for name, counts in (("send_counts", send_counts), ("receive_counts", receive_counts)):
            if len(counts) != self.world_size or min(counts) < 0:
                raise MidspanError(
                    f"{name} must hold a count for each of {self.world_size} ranks, not {list(counts)}.",
                    remedy="Give each rank's count, 0 for none.",
                )
        if own.ndim == 0 or sum(send_counts) != len(own) or send_counts[self.rank] != receive_counts[self.rank]:
            raise MidspanError(
                f"send_counts {list(send_counts)} and receive_counts {list(receive_counts)} do not fit an array of "
                f"shape {own.shape} on rank {self.rank}.",
                remedy="send_counts must add up to the rows, and what a rank sends to itself it receives.",
            )
        borders = np.cumsum([0, *send_counts])
        pieces = [own[begin:end] for begin, end in pairwise(borders)]
        parts = self._exchanged(pieces, _ALL_TO_ALL)
        for rank, (part, count) in enumerate(zip(parts, receive_counts, strict=True)):
            self._agree(rank, part, own, apart_from=0)
            if len(part) != count:
                raise self._disagreement(rank, f"sent {len(part)} rows where {count} were awaited")
        return self.to_device(np.concatenate(parts))

    def send(self, array: Any, rank: int) -> None:
        """Send to one rank, which must receive."""
        self._require_other(rank)
        self._transfer({rank: self.to_host(array)}, frozenset(), _SEND)

    def receive(self, shape: tuple[int, ...], dtype: str, rank: int) -> Any:
        """Receive what one rank sends."""
        self._require_other(rank)
        if dtype not in FRAME_TYPES:
            raise MidspanError(f"There is no element type '{dtype}'.", remedy=f"Take one of {', '.join(FRAME_TYPES)}.")
        found = self._transfer({}, frozenset((rank,)), _SEND)[rank]
        self._agree(rank, found, np.empty(shape, FRAME_TYPES[dtype]))
        return self.to_device(found)

    def broadcast(self, array: Any, rank: int) -> Any:
        """One rank's array, on every rank."""
        self._require_rank(rank)
        own = self.to_host(array)
        if rank == self.rank:
            self._transfer(dict.fromkeys(self._others(), own), frozenset(), _BROADCAST)
            return self.to_device(own.copy())
        found = self._transfer({}, frozenset((rank,)), _BROADCAST)[rank]
        self._agree(rank, found, own)
        return self.to_device(found)

    def close(self) -> None:
        """Leave the group; the others' operations fail from then on."""
        self._closed = True
        for peer in self._peers.values():
            peer.connection.close()

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _to_all(self, own: Array, operation: int) -> list[Array]:
        """Everybody's array, by rank."""
        return self._exchanged([own] * self.world_size, operation)

    def _exchanged(self, pieces: Sequence[Array], operation: int) -> list[Array]:
        """Piece r goes to rank r; returns what came from each rank."""
        outgoing = {rank: pieces[rank] for rank in self._others()}
        found = self._transfer(outgoing, frozenset(self._others()), operation)
        return [pieces[rank] if rank == self.rank else found[rank] for rank in range(self.world_size)]

    def _summed(self, shares: Sequence[Array], operation: int) -> Array:
        """The sum of this rank's share over all ranks, in the order of ranks."""
        own = shares[self.rank]
        parts = self._exchanged(shares, operation)
        for rank, part in enumerate(parts):
            self._agree(rank, part, own)
        wide = np.float32 if own.dtype.itemsize < np.dtype(np.float32).itemsize else own.dtype
        total = parts[0].astype(wide)
        with np.errstate(all="ignore"):
            for part in parts[1:]:
                total += part.astype(wide)
            return total.astype(own.dtype)

    def _transfer(self, outgoing: Mapping[int, Array], senders: frozenset[int], operation: int) -> dict[int, Array]:
        if self._closed:
            raise DeviceLost("This rank has left its group.", remedy="Start the whole group again.")
        with self._turn:
            try:
                transfer = Transfer(self._peers, outgoing, senders, operation=operation, patience=self._patience)
                return transfer.run()
            except BaseException:
                self.close()
                raise

    def _agree(self, rank: int, found: Array, own: Array, *, apart_from: int | None = None) -> None:
        same = found.ndim == own.ndim and all(
            theirs == ours or place == apart_from
            for place, (theirs, ours) in enumerate(zip(found.shape, own.shape, strict=True))
        )
        if not same or found.dtype != own.dtype:
            raise self._disagreement(
                rank, f"brought {found.dtype} of shape {found.shape} where {own.dtype} of shape {own.shape} was awaited"
            )

    def _disagreement(self, rank: int, what: str) -> MidspanError:
        self.close()
        return MidspanError(
            f"Rank {rank} {what} (rank {self.rank}).",
            remedy="Every rank must call the same operations with arrays that fit.",
        )

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise MidspanError(
                f"There is no rank {rank} in a group of {self.world_size}.", remedy="Ranks are counted from 0."
            )

    def _require_other(self, rank: int) -> None:
        self._require_rank(rank)
        if rank == self.rank:
            raise MidspanError(f"Rank {rank} cannot send to itself.", remedy="Name another rank.")


def _axis(axis: int, array: Array) -> int:
    """The axis counted from the first one."""
    if not -array.ndim <= axis < array.ndim:
        raise MidspanError(f"An array of shape {array.shape} has no axis {axis}.", remedy="Name one that it has.")
    return axis % array.ndim
