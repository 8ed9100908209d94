"""Runs the code that plugins bring outside of steps: what it prints, and how long it takes.

Knows no plugin by name. Results of commands go to standard output, so what a plugin prints
goes to standard error; and a person who waits for a plugin hears for which one, and how to
go on without it. Nothing is stopped here.

Not covered: what other languages write to the process's own output, and code that keeps
the interpreter's lock while it hangs, during which nobody can speak.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from midspan.settings import SKIP_PLUGINS

PATIENCE_SECONDS = 5.0
"""After so long, people hear what they wait for."""
_ONE_AT_A_TIME = threading.RLock()
"""Redirecting is for the whole process: two threads that do it by turns would leave it redirected."""


@contextmanager
def plugin_code(
    doing: str, distribution: str, entry_point: str, *, patience: float = PATIENCE_SECONDS
) -> Iterator[None]:
    """Run a plugin's code: prints go to standard error, and a long wait is told there, see ``told_when_long``."""
    with told_when_long(doing, distribution, entry_point, patience=patience), prints_as_errors():
        yield


@contextmanager
def told_when_long(
    doing: str, distribution: str, entry_point: str, *, patience: float = PATIENCE_SECONDS
) -> Iterator[None]:
    """Say in one line on standard error for whom a person waits, once that takes long or is interrupted.

    Args:
        doing: what is done, to complete "Still ...".
        distribution: the plugin's package, as pip names it.
        entry_point: its name; empty for what ships with the core, which nobody can leave out.
        patience: seconds after which the line is printed.
    """
    instead = f"; to go on without it: {SKIP_PLUGINS}={entry_point}, or pip uninstall {distribution}"
    timer = threading.Timer(patience, _say, [f"Still {doing}{instead if entry_point else ''}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        _say(f"Interrupted while {doing}")
        raise
    finally:
        timer.cancel()


@contextmanager
def prints_as_errors() -> Iterator[None]:
    """What Python code prints meanwhile goes to standard error. One thread at a time does this; others wait."""
    with _ONE_AT_A_TIME, redirect_stdout(sys.stderr):
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
