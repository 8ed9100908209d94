"""Simulated devices form groups: real numbers over sockets, the ring's time beside them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from midspan.errors import MidspanError, SettingsError
from midspan.interface import DeviceGroup
from midspan_simulated.array_space import SimulatedArray
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.ring import Ring

OpenSimulated = Callable[..., Any]


def in_group(devices: list[Any], work: Callable[[Any], Any]) -> list[Any]:
    """Run one function on every rank's collectives, each in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

    def one(rank: int) -> Any:
        group = DeviceGroup(rank=rank, world_size=len(devices), address=address, timeout_seconds=30.0)
        return work(devices[rank].join(group))

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(one, range(len(devices))))


def test_three_devices_exchange_their_own_arrays(open_simulated: OpenSimulated) -> None:
    devices = [open_simulated(world_size="3") for _ in range(3)]

    def work(collectives: Any) -> list[Any]:
        rank = collectives.rank
        own = collectives.to_device(np.arange(6, dtype=np.float32).reshape(3, 2) + rank)
        found = [
            collectives.all_reduce(own),
            collectives.all_gather(own, 1),
            collectives.reduce_scatter(own, 0),
            collectives.broadcast(own, 2),
            collectives.all_to_all(own, [1, 1, 1], [1, 1, 1]),
        ]
        if rank == 0:
            collectives.send(own, 1)
        if rank == 1:
            found.append(collectives.receive((3, 2), "float32", 0))
        assert all(isinstance(array, SimulatedArray) for array in found)
        assert collectives.take_seconds() == 0
        return [collectives.to_host(array) for array in found]

    base = np.arange(6, dtype=np.float32).reshape(3, 2)
    parts = [base + rank for rank in range(3)]
    for rank, found in enumerate(in_group(devices, work)):
        total = np.sum(parts, axis=0)
        wanted = [
            total,
            np.concatenate(parts, axis=1),
            total[rank : rank + 1],
            parts[2],
            np.stack([part[rank] for part in parts]),
            *([parts[0]] if rank == 1 else []),
        ]
        assert len(found) == len(wanted)
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_an_exchange_takes_the_ring_s_time_on_the_sheet_s_links(open_simulated: OpenSimulated) -> None:
    options = {"world_size": "2", "dtypes": "float32", "bandwidth_efficiency": "0.5"}
    devices = [open_simulated("a100", **options) for _ in range(2)]

    def work(collectives: Any) -> tuple[float, float, float]:
        own = collectives.to_device(np.ones((8, 4), np.float32))
        collectives.all_reduce(own)
        reduced = collectives.take_seconds()
        collectives.all_gather(own, 0)
        return reduced, collectives.take_seconds(), collectives.take_seconds()

    link = DATA_SHEETS["a100"].link_bandwidth
    assert link is not None
    ring = Ring(devices=2, bandwidth=0.5 * link)
    assert in_group(devices, work) == [(ring.all_reduce(128), ring.all_gather(256), 0.0)] * 2


def test_a_group_larger_than_claimed_is_refused(open_simulated: OpenSimulated) -> None:
    group = DeviceGroup(rank=0, world_size=2, address="127.0.0.1:1", timeout_seconds=1.0)
    with pytest.raises(SettingsError, match="groups of 1"):
        open_simulated().join(group)


def test_another_device_s_array_is_refused(open_simulated: OpenSimulated) -> None:
    devices = [open_simulated(world_size="2") for _ in range(2)]
    stranger = open_simulated()._space.put(np.ones(2, np.float32))

    def work(collectives: Any) -> str:
        with pytest.raises(MidspanError) as error:
            collectives.all_reduce(stranger)
        return str(error.value)

    assert all("another device" in message for message in in_group(devices, work))
