"""How the ranks of a group find each other: from one address to a connection between any two.

Rank 0 listens on the group's address. Every other rank calls it, proves that it knows the
group's token, and says where it listens itself; once all are there, rank 0 tells everybody
everybody's address, and each rank calls those before it. A mesh and no star, because then no
rank has to work for the messages of two others, and none is a bottleneck.

Knows no array and no device. Invariants: nobody is let in who does not know the token, the
world's size and the rank that the other side expects (HMAC-SHA256 over a fresh number of each
side, RFC 2104); the token itself never travels; a stranger on a port is turned away and does
not stop the others; everything ends by the group's timeout.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from midspan.errors import DeviceLost, SettingsError
from midspan.interface.collectives import DeviceGroup
from midspan.runtimes.reference.socket_frames import Peer

_GREETING = b"midspan group 1 "
_NONCE = 16
_LARGEST_RECORD = 1 << 16
_HANDSHAKE_SECONDS = 5.0
"""How long a caller may take to say who it is; a silent stranger holds the others up no longer."""
_RETRY_SECONDS = 0.02


class _Stranger(Exception):
    """The other side is no member of this group."""


def form_group(group: DeviceGroup) -> dict[int, Peer]:
    """Connect to all other ranks.

    Args:
        group: this rank's place.

    Returns:
        A peer for each other rank.

    Raises:
        SettingsError: rank, size, address or token cannot be right, or contradict the others'.
        DeviceLost: some did not come in time; the message names them.
    """
    host, port = _check(group)
    if group.world_size == 1:
        return {}
    forming = _Forming(group)
    try:
        if group.rank == 0:
            forming.gather(host, port)
        else:
            forming.join(host, port)
    except BaseException:
        for peer in forming.peers.values():
            peer.connection.close()
        raise
    for peer in forming.peers.values():
        peer.connection.setblocking(False)
        peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return forming.peers


def _check(group: DeviceGroup) -> tuple[str, int]:
    if group.world_size < 1 or not 0 <= group.rank < group.world_size:
        raise SettingsError(
            f"There is no rank {group.rank} in a group of {group.world_size}.",
            remedy="Ranks are counted from 0 to world_size - 1.",
        )
    host, colon, port = group.address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingsError(f"'{group.address}' is no address of a group.", remedy="Write host:port, 127.0.0.1:29500.")
    return host.strip("[]"), int(port)


class _Forming:
    """The connections that stand so far."""

    def __init__(self, group: DeviceGroup) -> None:
        self.peers: dict[int, Peer] = {}
        self._group = group
        self._deadline = time.monotonic() + group.timeout_seconds

    def gather(self, host: str, port: int) -> None:
        """As rank 0: wait for all, then tell them where the others are."""
        with _listening(host, port) as listener:
            addresses = self._accept(listener, {*range(1, self._group.world_size)})
        for peer in self.peers.values():
            _send_record(peer.connection, {"addresses": {str(rank): list(at) for rank, at in addresses.items()}})

    def join(self, host: str, port: int) -> None:
        """As another rank: call rank 0, then the ranks before this one, then wait for those after it."""
        first = self._call(0, host, port)
        with _listening(first.getsockname()[0], 0) as listener:
            self._introduce(first, 0, listener.getsockname()[1])
            addresses = self._addresses(first)
            for rank in range(1, self._group.rank):
                connection = self._call(rank, *addresses[rank])
                self._introduce(connection, rank, 0)
            self._accept(listener, {*range(self._group.rank + 1, self._group.world_size)})

    def _accept(self, listener: socket.socket, awaited: set[int]) -> dict[int, tuple[str, int]]:
        addresses: dict[int, tuple[str, int]] = {}
        while awaited:
            listener.settimeout(self._left(awaited))
            try:
                connection, address = listener.accept()
            except TimeoutError:
                raise self._missing(awaited) from None
            try:
                rank, port = self._receive_caller(connection)
                if rank not in awaited:
                    raise SettingsError(
                        f"Two members of the group at {self._group.address} say that they are rank {rank}.",
                        remedy="Give each its own rank.",
                    )
                _send_record(connection, {"welcome": True})
            except (_Stranger, OSError):
                connection.close()
                continue
            except SettingsError as error:
                with suppress(OSError):
                    _send_record(connection, {"refused": error.message})
                connection.close()
                raise
            self.peers[rank] = Peer(rank=rank, connection=connection)
            addresses[rank] = (address[0], port)
            awaited.discard(rank)
        return addresses

    def _receive_caller(self, connection: socket.socket) -> tuple[int, int]:
        """Which rank it is and where it listens."""
        connection.settimeout(min(_HANDSHAKE_SECONDS, self._group.timeout_seconds))
        own = secrets.token_bytes(_NONCE)
        connection.sendall(_GREETING + own)
        answer = _receive_record(connection)
        said = answer.get("says")
        if not isinstance(said, dict) or not _equal(answer.get("proof"), self._proof("caller", own, said)):
            raise _Stranger
        rank, size, port, theirs = (said.get(name) for name in ("rank", "world_size", "port", "nonce"))
        if not (isinstance(rank, int) and isinstance(port, int) and isinstance(theirs, str)):
            raise _Stranger
        if size != self._group.world_size or said.get("to") != self._group.rank or rank >= self._group.world_size:
            raise SettingsError(
                f"Rank {rank} came to a group of {self._group.world_size} as a member of a group of {size}.",
                remedy="Give all members the same world_size and address.",
            )
        _send_record(connection, {"proof": self._proof("listener", bytes.fromhex(theirs), said)})
        return rank, port

    def _call(self, rank: int, host: str, port: int) -> socket.socket:
        while True:
            try:
                return socket.create_connection((host, port), timeout=self._left({rank}))
            except OSError as error:
                if time.monotonic() + _RETRY_SECONDS >= self._deadline:
                    raise self._missing({rank}) from error
                time.sleep(_RETRY_SECONDS)

    def _introduce(self, connection: socket.socket, rank: int, port: int) -> None:
        """Say who this is, and have the other side prove that it is of the group."""
        self.peers[rank] = Peer(rank=rank, connection=connection)
        connection.settimeout(self._left({rank}))
        try:
            greeting = _receive(connection, len(_GREETING) + _NONCE)
            nonce = secrets.token_bytes(_NONCE)
            said = {
                "rank": self._group.rank,
                "to": rank,
                "world_size": self._group.world_size,
                "port": port,
                "nonce": nonce.hex(),
            }
            proof = self._proof("caller", greeting[-_NONCE:], said)
            _send_record(connection, {"says": said, "proof": proof})
            answer = _receive_record(connection)
            refused = answer.get("refused")
            if refused is None:
                if not _equal(answer.get("proof"), self._proof("listener", nonce, said)):
                    raise _Stranger
                refused = _receive_record(connection).get("refused")
        except TimeoutError:
            raise self._missing({rank}) from None
        except (_Stranger, OSError) as error:
            raise SettingsError(
                f"What listens at {self._group.address} is not this group's rank {rank}, or turned this rank away.",
                remedy="Give all members the same address and token, and the group a port of its own.",
            ) from error
        if refused is not None:
            raise SettingsError(str(refused), remedy="Give all members the same settings, and each its own rank.")

    def _addresses(self, connection: socket.socket) -> dict[int, tuple[str, int]]:
        connection.settimeout(self._left({0}))
        try:
            found = _receive_record(connection).get("addresses")
        except TimeoutError:
            raise DeviceLost(
                f"The group at {self._group.address} did not become complete within "
                f"{self._group.timeout_seconds:g} seconds.",
                remedy="Look at the ranks that did not start; rank 0 names them.",
            ) from None
        except (_Stranger, OSError) as error:
            raise DeviceLost(
                f"Rank 0 gave the group at {self._group.address} up before all had come.",
                remedy="Look at what rank 0 says.",
            ) from error
        if not isinstance(found, dict):
            raise DeviceLost(f"Rank 0 at {self._group.address} sent no addresses.", remedy="Start the group again.")
        return {int(rank): (str(host), int(port)) for rank, (host, port) in found.items()}

    def _proof(self, side: str, nonce: bytes, said: dict[str, Any]) -> str:
        text = json.dumps(said, sort_keys=True).encode()
        return hmac.new(self._group.token.encode(), side.encode() + nonce + text, hashlib.sha256).hexdigest()

    def _left(self, awaited: set[int]) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._missing(awaited)
        return left

    def _missing(self, awaited: set[int]) -> DeviceLost:
        names = ", ".join(str(rank) for rank in sorted(awaited))
        return DeviceLost(
            f"{'Rank' if len(awaited) == 1 else 'Ranks'} {names} did not come to the group at {self._group.address} "
            f"within {self._group.timeout_seconds:g} seconds.",
            remedy="Start all members of the group, with the same address and world_size.",
        )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"Rank 0 cannot listen on {host}:{port}: {error}.", remedy="Give the group an address that is free."
            ) from error
        listener.listen(128)
        yield listener


def _equal(given: object, wanted: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), wanted.encode())


def _send_record(connection: socket.socket, record: dict[str, Any]) -> None:
    text = json.dumps(record).encode()
    connection.sendall(struct.pack("<I", len(text)) + text)


def _receive_record(connection: socket.socket) -> dict[str, Any]:
    (length,) = struct.unpack("<I", _receive(connection, 4))
    if length > _LARGEST_RECORD:
        raise _Stranger
    try:
        record = json.loads(_receive(connection, length))
    except ValueError as error:
        raise _Stranger from error
    if not isinstance(record, dict):
        raise _Stranger
    return record


def _receive(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = connection.recv(count - len(found))
        if not piece:
            raise _Stranger
        found += piece
    return found
