"""Each check of caches fails for the fault that it is meant for, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from midspan.conformance.subject import Subject

Failures = Callable[..., set[str]]
Open = Callable[..., Subject]

END = "-float32-blocks-16"


def test_a_device_that_is_right_fails_nothing(open_flawed: Open, failures: Failures) -> None:
    assert failures(open_flawed(), "caches") == set()


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("copies one after the other", {f"copy{END}"}),
        ("padding spills", {f"padding-block{END}", f"attention-after-migration{END}"}),
        ("reads into one buffer", {f"copies-on-the-host{END}"}),
        ("counts itself twice", {f"sizes{END}"}),
        ("a closed cache reads as zeros", {"closed-cache-raises"}),
        ("a closed cache ends the process", {"closed-cache-raises"}),
        ("a cache closes once", {"closes-twice"}),
        ("blocks count from the end", {"block-that-does-not-exist-raises"}),
        ("unknown groups are the first", {"group-that-does-not-exist-raises"}),
        ("data is stretched", {"data-of-another-shape-raises"}),
    ],
)
def test_a_fault_is_caught_by_the_check_for_it(
    fault: str, caught_by: set[str], open_flawed: Open, failures: Failures
) -> None:
    assert failures(open_flawed(fault), "caches") == caught_by


@pytest.mark.parametrize("fault", ["forgets the last layer", "float64"])
def test_a_cache_that_gives_something_else_back_fails_wherever_it_is_read(
    fault: str, open_flawed: Open, failures: Failures
) -> None:
    found = failures(open_flawed(fault), "caches", ("blocks-16",))
    assert f"write-and-read{END}" in found
    assert f"sizes{END}" not in found
