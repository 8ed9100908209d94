"""One rank of a group, in a process of its own: opens its device, joins, and does what it is told.

Knows no other rank's process; what they do together is ``collective_cases``.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from midspan.conformance.child_process import answer
from midspan.conformance.collective_cases import collective_cases
from midspan.conformance.subject import Subject, open_subject
from midspan.errors import DeviceLost, MidspanError, SettingsError
from midspan.interface import Collectives, DeviceGroup, DeviceInfo, GroupDevice

LEAVING_CODE = 7
"""With which a rank ends that leaves without a word."""


def run_rank(arguments: dict[str, Any]) -> dict[str, Any]:
    """Join a group and take part.

    Args:
        arguments: ``device`` and ``options``; ``rank``, ``world_size``, ``address``, ``seconds``; ``part``:
            ``cases`` (all of them), ``leave`` (the last rank dies before the second operation) or ``join``
            (nothing but joining).
    """
    subject = open_subject(arguments["device"], arguments["options"])
    rank = int(arguments["rank"])
    info = rank_device(subject, rank)
    device: GroupDevice = subject.plugin.open(info, subject.options)  # type: ignore[assignment]
    group = DeviceGroup(
        rank=rank,
        world_size=int(arguments["world_size"]),
        address=arguments["address"],
        timeout_seconds=float(arguments["seconds"]),
        token="conformance",
    )
    try:
        if arguments["part"] == "join":
            return _outcome(lambda: device.join(group))
        collectives = device.join(group)
        if arguments["part"] == "leave":
            return _lose_a_rank(collectives)
        result = _run_cases(collectives, device.capabilities.dtypes)
        collectives.close()
        return result
    finally:
        device.close()


def rank_device(subject: Subject, rank: int) -> DeviceInfo:
    """The device that a rank opens: of numbered ones (``name:0``, ``name:1``) the next, else the same for all."""
    numbered = [info for info in subject.discovered.devices() if info.id.partition(":")[2].isdecimal()]
    places = [place for place, info in enumerate(numbered) if info.id == subject.info.id]
    return numbered[(places[0] + rank) % len(numbered)] if places else subject.info


def _run_cases(group: Collectives, dtypes: tuple[str, ...]) -> dict[str, Any]:
    results = []
    for case in collective_cases(group.rank, group.world_size, dtypes):
        found = case.run(group)
        digest = None
        if found is not None and case.same_everywhere:
            digest = hashlib.sha256(found.tobytes()).hexdigest()
        results.append([case.operation, case.name, case.problem(found), digest])
    return {"results": results, "rank": group.rank, "world_size": group.world_size}


def _lose_a_rank(group: Collectives) -> dict[str, Any]:
    import numpy as np

    array = np.ones((300, 7), np.float32)
    group.all_reduce(group.to_device(array))
    if group.rank == group.world_size - 1:
        os._exit(LEAVING_CODE)
    return _outcome(lambda: group.to_host(group.all_reduce(group.to_device(array))))


def _outcome(action: Any) -> dict[str, Any]:
    began = time.monotonic()
    kind, message = "returned", ""
    try:
        action()
    except DeviceLost as error:
        kind, message = "lost", str(error)
    except SettingsError as error:
        kind, message = "refused", str(error)
    except MidspanError as error:
        kind, message = type(error).__name__, str(error)
    return {"outcome": kind, "message": message, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    answer(run_rank)
