"""A limit on how long something may take, for code that nothing can interrupt.

Knows threads and the process, and no check. Who never comes back from a driver cannot be
stopped in Python; what can be done is to write down what is known and to end the process.

Invariants: within the limit nothing happens; beyond it the process ends with code 1, even if
telling about it fails, or if what hangs lets no other thread run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CHECK_SECONDS = 120.0
"""For one check, beside what it waits for processes of its own."""
LAST_SECONDS = 10.0
"""For telling about it; afterwards the process ends without."""
ENDED = 1
"""Exit code of a process that was ended."""


@contextmanager
def time_limit(seconds: float | None, expired: Callable[[], None], *, errors: int = 2) -> Iterator[None]:
    """Do something within a limit.

    Args:
        seconds: how long it may take; None or 0: for ever.
        expired: called in another thread when it took longer; the process ends when it returns.
        errors: file descriptor that gets the stacks of all threads then.
    """
    if not seconds:
        yield
        return
    timer = threading.Timer(seconds, _end, (expired, errors))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + LAST_SECONDS, exit=True, file=errors)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def no_answer(seconds: float) -> str:
    """The message of a check that took longer than its limit."""
    return f"gave no answer within {seconds:g} s"


def _end(expired: Callable[[], None], errors: int) -> None:
    try:
        faulthandler.dump_traceback(file=errors)
        expired()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(ENDED)
