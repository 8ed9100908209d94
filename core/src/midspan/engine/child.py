"""The engine process as its parent sees it: start, talk, end.

Knows messages and no requests. Invariant: the process holds its end of the socket
alone, so the end of the stream means that it is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

from midspan.engine.frames import frame, read_frame
from midspan.engine.messages import FromEngine, ToEngine, decode_from_engine, encode

STREAM_BUFFER_BYTES = 1 << 20


class EngineChild:
    """A running engine process. Made by ``spawn``."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls) -> EngineChild:
        """Start a process that waits for its first message.

        Must be called in the thread that lives as long as the process shall: the kernel
        ends the process with the thread that started it.
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
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=STREAM_BUFFER_BYTES)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Send without waiting; what a dead process would have got is dropped."""
        if not self._writer.is_closing():
            self._writer.write(frame(encode(message)))

    async def receive(self) -> FromEngine | None:
        """The next message, or None once the process is gone.

        Raises:
            ProtocolError: it sent what is no message; nothing after it can be trusted.
        """
        payload = await read_frame(self._reader)
        return None if payload is None else decode_from_engine(payload)

    async def end(self, patience: float) -> str:
        """Wait for the process to end, and kill it when it does not.

        Args:
            patience: seconds to wait before the kill.

        Returns:
            How it ended, for people.
        """
        self._writer.close()
        deadline = asyncio.get_running_loop().time() + patience
        while self._process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        if self._process.poll() is None:
            self._process.kill()
        status = await asyncio.to_thread(self._process.wait)
        if status < 0:
            return f"killed by signal {signal.Signals(-status).name}"
        return f"exit status {status}"
