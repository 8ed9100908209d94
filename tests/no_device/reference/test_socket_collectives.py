"""Collectives over sockets: right sums, the same bits everywhere, and no rank that waits for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from midspan.conformance.collective_cases import collective_cases
from midspan.errors import DeviceLost, MidspanError, SettingsError
from midspan.interface import DeviceGroup, DeviceInfo
from midspan.runtimes.reference import ArrayLibrary, ReferenceDevice
from midspan.runtimes.reference.socket_collectives import SocketCollectives

DTYPES = ("float32", "bfloat16", "float16")
LONG = 20.0
"""Seconds that no rank here comes to wait."""

Work = Callable[[SocketCollectives], Any]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def group(rank: int, world_size: int, address: str, **more: Any) -> DeviceGroup:
    return DeviceGroup(rank=rank, world_size=world_size, address=address, **{"timeout_seconds": LONG, **more})


def together(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do things at once, each in a thread; an exception is a result."""
    results: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        try:
            results[place] = works[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    return results


def once(place: DeviceGroup, work: Work) -> Any:
    """Join, do something, leave."""
    with closing(SocketCollectives(place)) as collectives:
        return work(collectives)


def in_group(works: Sequence[Work], *, arrays: ArrayLibrary | None = None, **more: Any) -> list[Any]:
    """Form a group of as many ranks as there are works, and let each do its own."""
    address = free_address()

    def member(rank: int) -> Any:
        options = {} if arrays is None else {"arrays": arrays}
        collectives = SocketCollectives(group(rank, len(works), address, **more), **options)
        try:
            return works[rank](collectives)
        finally:
            collectives.close()

    return together([lambda rank=rank: member(rank) for rank in range(len(works))])  # type: ignore[misc]


class Tile:
    """An array that numpy cannot read."""

    __array__ = None

    def __init__(self, content: np.ndarray[Any, Any]) -> None:
        self.content = content.copy()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_operation_gives_what_numpy_gives_on_arrays_of_the_devices_own(world_size: int) -> None:
    def all_cases(collectives: SocketCollectives) -> list[str]:
        return [
            f"{case.operation} {case.name}: {problem}"
            for case in collective_cases(collectives.rank, world_size, DTYPES)
            if (problem := case.problem(case.run(collectives)))
        ]

    tiles = ArrayLibrary(to_device=Tile, to_host=lambda tile: tile.content)
    assert in_group([all_cases] * world_size, arrays=tiles) == [[]] * world_size


def test_a_sum_is_taken_in_the_order_of_ranks_in_float32_and_rounded_once() -> None:
    values = [np.array([256.0, 2.0**20], ml_dtypes.bfloat16), np.array([1.0, -(2.0**20)]), np.array([1.0, 2.0**-10])]
    arrays = [value.astype(ml_dtypes.bfloat16) for value in values]
    results = in_group([lambda collectives: collectives.all_reduce(arrays[collectives.rank])] * 3)
    for result in results:
        assert result.dtype == ml_dtypes.bfloat16
        # 256 + 1 + 1 would stay 256 if each sum were rounded; (2^20 - 2^20) + 2^-10 would be 0 in another order.
        assert result.astype(np.float32).tolist() == [258.0, 2.0**-10]


def test_large_arrays_cross_in_both_directions_at_once() -> None:
    counts = [2_000_000, 2_000_000]

    def swap(collectives: SocketCollectives) -> tuple[int, int]:
        rows = np.full(4_000_000, collectives.rank, np.int32)
        found = collectives.all_to_all(rows, counts, counts)
        return int(found[0]), int(found[-1])

    assert in_group([swap, swap]) == [(0, 1), (0, 1)]


def test_a_rank_that_leaves_makes_the_others_fail_and_not_wait() -> None:
    def stay(collectives: SocketCollectives) -> Any:
        return collectives.all_reduce(np.ones(3, np.float32))

    first, second, last = in_group([stay, stay, lambda collectives: "left"])
    assert last == "left"
    assert isinstance(first, DeviceLost)
    assert isinstance(second, DeviceLost)
    assert "Rank" in str(first)


def test_a_rank_that_does_not_come_to_an_operation_is_named_when_the_time_is_up() -> None:
    over = threading.Event()

    def wait_for_the_others(collectives: SocketCollectives) -> None:
        over.wait(30.0)

    def work(collectives: SocketCollectives) -> Any:
        try:
            return collectives.receive((3,), "float32", 1)
        finally:
            over.set()

    first, _ = in_group([work, wait_for_the_others], timeout_seconds=0.5)
    assert isinstance(first, DeviceLost)
    assert "Rank 1 did not come" in str(first)


def test_a_member_that_never_comes_is_named() -> None:
    address = free_address()
    found = together(
        [lambda rank=rank: SocketCollectives(group(rank, 4, address, timeout_seconds=1.0)) for rank in (0, 2)]  # type: ignore[misc]
    )
    assert all(isinstance(error, DeviceLost) for error in found)
    assert "Ranks 1, 3 did not come" in str(found[0])


def test_members_that_disagree_on_the_size_are_told() -> None:
    address = free_address()
    found = together([lambda: SocketCollectives(group(0, 2, address)), lambda: SocketCollectives(group(1, 3, address))])
    assert all(isinstance(error, SettingsError) for error in found)
    assert all("group of 3" in str(error) for error in found)


def test_two_members_of_one_rank_are_told() -> None:
    address = free_address()
    found = together([lambda rank=rank: SocketCollectives(group(rank, 3, address)) for rank in (0, 1, 1)])  # type: ignore[misc]
    assert isinstance(found[0], SettingsError)
    assert "rank 1" in str(found[0])


def test_who_does_not_know_the_token_is_turned_away_and_the_group_forms_without_it() -> None:
    address = free_address()

    def stranger() -> Any:
        return SocketCollectives(group(1, 2, address, token="guessed"))

    turned_away = threading.Event()

    def first() -> Any:
        return once(group(0, 2, address, token="secret"), lambda own: own.all_reduce(np.ones(1, np.float32))[0])

    def second() -> Any:
        turned_away.wait(30.0)
        return once(group(1, 2, address, token="secret"), lambda own: own.all_reduce(np.ones(1, np.float32))[0])

    def intruder() -> Any:
        try:
            return stranger()
        finally:
            turned_away.set()

    one, other, outside = together([first, second, intruder])
    assert (one, other) == (2.0, 2.0)
    assert isinstance(outside, SettingsError)
    assert "token" in str(outside)


def test_noise_on_the_port_does_not_stop_the_group() -> None:
    address = free_address()
    host, port = address.split(":")
    noisy = threading.Event()

    def noise() -> None:
        for content in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 500):
            while True:
                try:
                    with socket.create_connection((host, int(port)), timeout=5) as connection:
                        connection.sendall(content)
                    break
                except ConnectionRefusedError:
                    continue
        noisy.set()

    def second() -> Any:
        noisy.wait(30.0)
        return once(group(1, 2, address), lambda own: own.broadcast(np.zeros(2, np.float32), 0))

    def first() -> Any:
        return once(group(0, 2, address), lambda own: own.broadcast(np.ones(2, np.float32), 0))

    _, one, other = together([noise, first, second])
    assert one.tolist() == other.tolist() == [1.0, 1.0]


def test_ranks_in_different_operations_are_told_so() -> None:
    array = np.ones(3, np.float32)
    found = in_group([lambda one: one.all_reduce(array), lambda other: other.all_gather(array, 0)])
    assert all(isinstance(error, MidspanError) for error in found)
    assert any("same operations in the same order" in str(error) for error in found)


def test_arrays_that_do_not_fit_are_told_and_end_the_group() -> None:
    def work(collectives: SocketCollectives) -> Any:
        return collectives.all_gather(np.ones((2, 3 + collectives.rank), np.float32), 0)

    found = in_group([work, work])
    assert all(isinstance(error, MidspanError) for error in found)
    assert any("shape" in str(error) for error in found)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x01\xff" + bytes(18), "no array"),
        (b"\x05\x00\x01\x00" + bytes(4) + (2**60).to_bytes(8, "little"), "no array"),
        (b"\x05\x00\x01\x00" + bytes(4) + (12).to_bytes(8, "little") + (4).to_bytes(8, "little"), "length"),
    ],
    ids=["unknown type", "absurd length", "length of another shape"],
)
def test_a_frame_that_is_none_is_refused_before_anything_is_allocated(header: bytes, message: str) -> None:
    def send_rubbish(collectives: SocketCollectives) -> None:
        collectives._peers[0].connection.sendall(header + bytes(16 - len(header) % 16))
        collectives._peers[0].connection.setblocking(True)
        collectives._peers[0].connection.recv(1)

    found, _ = in_group([lambda collectives: collectives.receive((3,), "float32", 1), send_rubbish])
    assert isinstance(found, DeviceLost)
    assert message in str(found)


@pytest.mark.parametrize(
    "wrong",
    [{"address": "nowhere"}, {"address": "127.0.0.1:99999"}, {"rank": 2}, {"rank": -1}],
    ids=["no port", "no such port", "rank too large", "negative rank"],
)
def test_settings_that_cannot_be_right_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SocketCollectives(DeviceGroup(**{"rank": 0, "world_size": 2, "address": "127.0.0.1:1", **wrong}))


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    def work(collectives: SocketCollectives) -> int:
        array = np.ones((4, 2), np.float32)
        for wrong in (
            lambda: collectives.all_to_all(array, [1, 1], [1, 1]),
            lambda: collectives.all_to_all(array, [4], [4]),
            lambda: collectives.all_gather(array, 2),
            lambda: collectives.send(array, collectives.rank),
            lambda: collectives.broadcast(array, 2),
            lambda: collectives.receive((1,), "float64", 1 - collectives.rank),
        ):
            with pytest.raises(MidspanError):
                wrong()
        return int(collectives.all_reduce(array).sum())

    assert in_group([work, work]) == [16, 16]


def test_the_reference_device_joins_groups_as_large_as_it_claims_and_leaves_them_when_closed() -> None:
    info = DeviceInfo(id="reference", description="a test", memory_bytes=1)
    device = ReferenceDevice(info)
    most = device.capabilities.max_world_size
    assert most == 8
    with pytest.raises(SettingsError, match="8 at most"):
        device.join(group(0, most + 1, "127.0.0.1:1"))
    collectives = device.join(group(0, 1, "127.0.0.1:1"))
    assert collectives.all_reduce(np.ones(2, np.float32)).tolist() == [1.0, 1.0]
    device.close()
    with pytest.raises(DeviceLost, match="left its group"):
        collectives.all_reduce(np.ones(2, np.float32))
