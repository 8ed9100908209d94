"""What pytest loads in every environment where this package is installed: next to nothing.

A run that does not name ``midspan.conformance`` is left as it is: no option, no hook. In
one that does, the suite's options are added after the user's own ``conftest.py`` files
were read, so that an option of theirs with the same name is never the loser.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

PACKAGE = "midspan.conformance"


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: Sequence[str]
) -> Generator[None, None, None]:
    """Bring the suite in where the command line names it."""
    yield
    if any(_names_the_suite(argument) for argument in args):
        from midspan.conformance.pytest_suite import PytestSuite, add_options

        add_options(parser)
        early_config.pluginmanager.register(PytestSuite(early_config), "midspan-conformance-suite")


def _names_the_suite(argument: str) -> bool:
    target = argument.split("::")[0]
    if target == PACKAGE:
        return True
    path = Path(target)
    return path.name == Path(__file__).parent.name and path.resolve() == Path(__file__).resolve().parent
