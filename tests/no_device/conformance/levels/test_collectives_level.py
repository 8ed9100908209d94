"""The level of collectives: the reference passes, and groups that are wrong are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from midspan.conformance.children.collective_rank import rank_device
from midspan.conformance.levels import collectives
from midspan.conformance.report import Outcome
from midspan.conformance.subject import open_subject
from midspan.interface import Capabilities, DeviceInfo, Found
from midspan.runtimes.reference import ReferenceDevice

GROUP_OF = """
class Group(SocketCollectives):
{methods}

class Device(ReferenceDevice):
    def join(self, group):
        return Group(group, arrays=self._arrays)

def open_device(info, options):
    claims = dataclasses.replace(CAPABILITIES, dtypes=("float32", "bfloat16"), max_world_size=3)
    return Device(info, capabilities=claims)
"""


def group_of(methods: str) -> str:
    lines = [f"    {line}" for line in methods.strip("\n").splitlines()]
    return GROUP_OF.format(methods="\n".join(lines))


def test_the_reference_passes(outcomes: Any) -> None:
    subject = open_subject("reference")
    found = outcomes(subject, "collectives")
    subject.close()
    wrong = {name: outcome.message for name, outcome in found.items() if outcome.outcome is not Outcome.PASSED}
    assert wrong == {}


def test_a_device_that_claims_no_group_skips_the_level(subject_of: Any, outcomes: Any) -> None:
    found = outcomes(subject_of(lambda info: ReferenceDevice(info, capabilities=Capabilities())), "collectives")
    assert {(item.outcome, item.message) for item in found.values()} == {(Outcome.SKIPPED, "max_world_size is 1")}


WRONG_GROUPS = {
    "a lost rank": (
        "def all_reduce(self, array):\n    return super().all_reduce(array * (self.rank != 1))",
        "all-reduce-of-2",
        "elements are off",
    ),
    "other bits on one rank": (
        "def all_reduce(self, array):\n"
        "    found = super().all_reduce(array)\n"
        "    return np.nextafter(found, np.float32(9)) if self.rank and found.dtype == np.float32 else found",
        "all-reduce-of-2",
        "different bits",
    ),
    "ranks in the wrong order": (
        "def _exchanged(self, pieces, operation):\n"
        "    found = super()._exchanged(pieces, operation)\n"
        "    return found[::-1] if operation == 2 else found",
        "all-gather-of-2",
        "elements are off",
    ),
    "shares of the wrong size": (
        "def reduce_scatter(self, array, axis):\n"
        "    whole = super().all_reduce(array)\n"
        "    return np.array_split(np.flip(whole, axis), self.world_size, axis)[self.rank]",
        "reduce-scatter-of-2",
        "elements are off",
    ),
    "a wider type": (
        "def broadcast(self, array, rank):\n    return super().broadcast(array, rank).astype(np.float32)",
        "broadcast-of-2",
        "elements of float32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_GROUPS)
def test_a_collective_that_is_wrong_is_found(wrong: str, installed: Any, outcome: Any) -> None:
    methods, check, message = WRONG_GROUPS[wrong]
    subject = installed(group_of(methods))
    assert message in outcome(subject, f"collectives/{check}").message
    assert outcome(subject, "collectives/send-and-receive-of-2").outcome is Outcome.PASSED
    assert "max_world_size is 3" in outcome(subject, "collectives/all-reduce-of-4").message


def test_a_rank_that_waits_for_the_dead_is_found(installed: Any, outcome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_CHILD_SECONDS", 5.0)
    subject = installed(
        group_of(
            "def all_reduce(self, array):\n"
            "    try:\n"
            "        return super().all_reduce(array)\n"
            "    except Exception:\n"
            "        threading.Event().wait()"
        )
    )
    assert "did not end in time" in outcome(subject, "collectives/a-rank-that-dies-is-an-error").message


def test_a_rank_that_makes_do_without_the_dead_is_found(installed: Any, outcome: Any) -> None:
    subject = installed(
        group_of(
            "def all_reduce(self, array):\n"
            "    try:\n"
            "        return super().all_reduce(array)\n"
            "    except Exception:\n"
            "        return array"
        )
    )
    assert "got returned and not DeviceLost" in outcome(subject, "collectives/a-rank-that-dies-is-an-error").message


def test_a_group_that_is_formed_beyond_what_is_claimed_is_found(installed: Any, outcome: Any) -> None:
    subject = installed(group_of("pass"))
    assert "not refused" in outcome(subject, "collectives/a-group-too-large-is-refused").message
    assert outcome(subject, "collectives/a-rank-that-never-comes-is-an-error").outcome is Outcome.PASSED


@pytest.mark.parametrize(
    ("examined", "opened"),
    [
        ("wrong:0", ["wrong:0", "wrong:1", "wrong:0"]),
        ("wrong:1", ["wrong:1", "wrong:0", "wrong:1"]),
        ("wrong:x", ["wrong:x"] * 3),
    ],
)
def test_ranks_open_the_numbered_devices_in_turn_and_any_other_one_together(
    examined: str, opened: list[str], subject_of: Any
) -> None:
    infos = tuple(
        DeviceInfo(id=f"wrong:{end}", description="one of several", memory_bytes=1) for end in ("0", "1", "x")
    )
    subject = subject_of(ReferenceDevice)
    chosen = next(info for info in infos if info.id == examined)
    several = replace(subject, discovered=replace(subject.discovered, probe=Found(infos)), info=chosen)
    assert [rank_device(several, rank).id for rank in range(3)] == opened


def test_a_device_that_claims_groups_and_cannot_join_one_is_told_so_in_a_line(subject_of: Any, outcomes: Any) -> None:
    claims = Capabilities(max_world_size=4)

    class Alone(ReferenceDevice):
        join = None  # type: ignore[assignment]

    found = outcomes(subject_of(lambda info: Alone(info, capabilities=claims)), "collectives")
    assert {item.outcome for item in found.values()} == {Outcome.FAILED}
    assert all("join" in item.message and "\n" not in item.message for item in found.values())
