"""Starts the engine's own process, before anything heavy is loaded here.

What the process needs first, the settings, is sent at once, so that it opens its
device while the caller still loads what it needs itself. Knows no event loop.

Invariant: the process holds its end of the socket alone, so the end of the stream
means that it is gone.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass

from midspan.engine.frames import frame
from midspan.engine.messages import Start, encode
from midspan.settings import EngineSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineProcess:
    """A process that was told its settings and waits to be told its model.

    Attributes:
        process: as the operating system knows it.
        connection: our end of the socket.
    """

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def abandon(self) -> None:
        """End it, for a caller that has no use for it any more."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def start_engine_process(settings: EngineSettings) -> EngineProcess:
    """Start a process that opens the device of the settings.

    Must be called in the thread that lives as long as the process shall: the kernel
    ends the process with the thread that started it.

    Args:
        settings: the engine's.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "midspan.engine.process", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    started = EngineProcess(process=process, connection=ours)
    try:
        ours.sendall(frame(encode(Start(settings=settings))))
    except (BrokenPipeError, ConnectionResetError):
        pass  # It ended already; whoever listens to it will see how.
    except BaseException:
        started.abandon()
        raise
    return started
