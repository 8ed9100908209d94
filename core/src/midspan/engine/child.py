"""The engine process as its parent sees it: talk, end.

Knows messages and no requests.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess

from midspan.engine.engine_process import EngineProcess
from midspan.engine.frames import LENGTH, check_length, frame
from midspan.engine.messages import FromEngine, ToEngine, decode_from_engine, encode

STREAM_BUFFER_BYTES = 1 << 20


class EngineChild:
    """A running engine process. Made by ``connect``."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, started: EngineProcess) -> EngineChild:
        """Talk to a process from this event loop."""
        try:
            reader, writer = await asyncio.open_unix_connection(sock=started.connection, limit=STREAM_BUFFER_BYTES)
        except BaseException:
            started.abandon()
            raise
        return cls(started.process, reader, writer)

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


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """As ``frames.receive_frame``, for asyncio."""
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        check_length(size)
        return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
