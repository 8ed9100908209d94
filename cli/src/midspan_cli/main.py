"""The entry point: runs one command of the command line.

Imports nothing but the standard library before it is called, so that Ctrl-C is
answered quietly from the first moment on. Errors that the program raises on
purpose are shown as a message and a remedy, with status 1; wrong usage has
status 2, and Ctrl-C has 130.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

END_OF_FLAGS = "--"
INTERRUPTED = 130
"""What a shell reports of a program that SIGINT ended: 128 and the signal's number."""


IMPORT_MACHINERY = "<frozen importlib"
SHOW_CURSOR = b"\x1b[?25h"


def main() -> None:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(run(sys.argv[1:]))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does: as usual, except while a module is being imported.

    There, libraries would take the exception for a broken installation and say so at length.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT_MACHINERY):
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(sys.stderr.fileno(), SHOW_CURSOR)
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    from midspan_cli.root_command import DEBUG_FLAG, create_cli

    words, debug = _without(DEBUG_FLAG, arguments)
    try:
        create_cli()(words, prog_name="midspan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception as error:
        from midspan_cli.failure_report import report_failure

        return report_failure(error, debug=debug)
    return 0


def _without(flag: str, arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The flag may stand anywhere before ``--``, as people add it at the end."""
    words = list(arguments)
    limit = words.index(END_OF_FLAGS) if END_OF_FLAGS in words else len(words)
    flags = [word for word in words[:limit] if word != flag]
    return flags + words[limit:], len(flags) < limit
