"""Which interface versions go together, over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from midspan.devices.interface_version import check_interface
from midspan.errors import InterfaceMismatch
from midspan.interface import DevicePlugin, Unavailable

numbers = st.integers(0, 30)
versions = st.tuples(numbers, numbers)


def plugin(interface: Any) -> DevicePlugin:
    return DevicePlugin(
        name="box",
        interface=interface,
        probe=lambda: Unavailable("none", "none"),
        open=lambda info, options: None,  # type: ignore[arg-type,return-value]
    )


@dataclass(frozen=True)
class Verdict:
    accepted: bool
    remedy: str = ""
    message: str = ""


def verdict(interface: Any, core: tuple[int, int]) -> Verdict:
    try:
        check_interface(plugin(interface), "midspan-box", core=core)
    except InterfaceMismatch as error:
        return Verdict(False, error.remedy, error.message)
    return Verdict(True)


@given(versions, versions)
@example((0, 9), (0, 9))
@example((0, 10), (0, 9))
@example((0, 9), (1, 0))
@example((1, 0), (0, 9))
def test_a_plugin_loads_where_the_major_is_equal_and_its_minor_not_newer(
    built: tuple[int, int], core: tuple[int, int]
) -> None:
    assert verdict(built, core).accepted == (built[0] == core[0] and built[1] <= core[1])


@given(versions, versions)
def test_a_refusal_names_both_versions_and_upgrades_the_older_side(
    built: tuple[int, int], core: tuple[int, int]
) -> None:
    found = verdict(built, core)
    if found.accepted:
        return
    assert f"{built[0]}.{built[1]}" in found.message
    assert f"{core[0]}.{core[1]}" in found.message
    older = "midspan-box" if built < core else "midspan"
    assert found.remedy.endswith(f"pip install --upgrade {older}")


@given(versions, versions)
def test_what_loads_goes_on_loading_in_every_later_minor(built: tuple[int, int], core: tuple[int, int]) -> None:
    if verdict(built, core).accepted:
        assert verdict(built, (core[0], core[1] + 1)).accepted
        assert not verdict(built, (core[0] + 1, core[1])).accepted


@pytest.mark.parametrize(
    "stated", [None, "0.9", 9, 0.9, (0,), (0, 9, 0), [0, 9], ("0", "9"), (0.0, 9.0), (0, -1), (True, 9), (0, None)]
)
def test_what_is_no_version_is_refused_and_shown(stated: object) -> None:
    found = verdict(stated, (0, 9))
    assert not found.accepted
    assert repr(stated) in found.message
    assert "midspan-box" in found.remedy
