"""The engine's own process: ``python -m midspan.engine.process FD PARENT``.

Reads messages from an inherited socket, steps the engine, writes events back.
Knows no prompt text, no client and no HTTP.

Invariants: the process ends when its parent does, however the parent ended;
a message that cannot be understood is answered with a problem and changes
nothing; waiting costs no processor time, and no thread works beside the step
(the reader sleeps in the kernel).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from midspan.engine.frames import BrokenStream, frame, receive_frame
from midspan.engine.loading import OpenedDevice, load_model, open_device
from midspan.engine.messages import (
    Abort,
    AddRequest,
    Attach,
    Detach,
    Fatal,
    FromEngine,
    Load,
    Piece,
    Ping,
    Pong,
    Problem,
    ProtocolError,
    Shutdown,
    Start,
    Started,
    StepEvents,
    ToEngine,
    decode_to_engine,
    encode,
)
from midspan.engine.move_desk import MoveDesk
from midspan.engine.step_loop import EngineCore
from midspan.errors import DeviceLost, InvalidRequest, MidspanError, PluginError
from midspan.settings import EngineSettings

logger = logging.getLogger("midspan.engine")

Message = TypeVar("Message", Start, Load)

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
PR_SET_PDEATHSIG = 1
"""From the Linux manual page prctl(2)."""


class Inbox:
    """Messages from the parent, read by a thread that sleeps while there are none.

    When the parent is gone, so is the reason to live: the thread ends the process at
    once, wherever the main thread is.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[ToEngine | ProtocolError] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def put(self, message: ToEngine) -> None:
        """Add a message of our own; safe in a signal handler."""
        self._messages.put(message)

    def get(self, *, block: bool) -> ToEngine | ProtocolError | None:
        """The next message, or the error that stands for an unreadable one; None when there is none."""
        try:
            return self._messages.get(block=block)
        except queue.Empty:
            return None

    def _read(self) -> None:
        while True:
            try:
                payload = receive_frame(self._connection)
            except BrokenStream as error:
                self._messages.put(error)
                return
            except OSError:
                payload = None
            if payload is None:
                os._exit(0)
            try:
                self._messages.put(decode_to_engine(payload))
            except ProtocolError as error:
                self._messages.put(error)


class EngineServer:
    """Serves one parent over one connection."""

    def __init__(self, connection: socket.socket, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._moves = MoveDesk(self._send)
        self._stopping = False

    def run(self) -> int:
        """Load, serve until told to stop, release.

        Returns:
            The exit status of the process.
        """
        try:
            core = self._load()
            if core is None:
                return 0
            try:
                self._serve(core)
            finally:
                core.close()
        except MidspanError as error:
            logger.debug("%s", error)  # The parent tells it to whoever should know.
            cause = error.__cause__
            if isinstance(error, PluginError) and cause is not None and not isinstance(cause, MidspanError):
                logger.error("what the plugin '%s' raised", error.plugin, exc_info=cause)
            restartable = isinstance(error, DeviceLost)
            self._send(Fatal(code=error.code, message=error.message, remedy=error.remedy, restartable=restartable))
            return 1
        except Exception as error:
            logger.exception("the engine failed")
            self._send(Fatal(code="internal_error", message=f"{type(error).__name__}: {error}", restartable=True))
            return 1
        return 0

    def _load(self) -> EngineCore | None:
        start = self._expect(Start, "first")
        if start is None:
            return None
        opened = open_device(start.settings, report=self._send)
        try:
            load = self._expect(Load, "second")
        except ProtocolError:
            opened.device.close()
            raise
        if load is None:
            opened.device.close()
            return None
        return self._started(start.settings, Path(load.path), opened)

    def _started(self, settings: EngineSettings, path: Path, opened: OpenedDevice) -> EngineCore:
        core = EngineCore(load_model(settings, path, opened=opened, report=self._send), settings)
        # What was loaded stays: the collector need not look at it again, nor now (0.2 s with torch loaded).
        gc.freeze()
        gc.enable()
        self._send(Started(model=core.model))
        return core

    def _expect(self, kind: type[Message], place: str) -> Message | None:
        """Wait for a message of a kind; None when told to end."""
        message = self._inbox.get(block=True)
        if isinstance(message, ProtocolError):
            raise message
        if isinstance(message, Shutdown):
            return None
        if not isinstance(message, kind):
            raise ProtocolError(f"The {place} message must be a {kind.__name__}, not a {type(message).__name__}.")
        return message

    def _serve(self, core: EngineCore) -> None:
        while True:
            changed = self._receive(core)
            if self._stopping:
                return
            if core.has_work():
                self._send(core.step())
            elif changed:
                self._send(StepEvents(sequences=core.take_events(), statistics=core.statistics()))

    def _receive(self, core: EngineCore) -> bool:
        message = self._inbox.get(block=not core.has_work())
        changed = False
        while message is not None:
            changed = self._handle(core, message) or changed
            message = self._inbox.get(block=False)
        return changed

    def _handle(self, core: EngineCore, message: ToEngine | ProtocolError) -> bool:
        if isinstance(message, AddRequest):
            return self._add(core, message)
        if isinstance(message, Abort):
            core.abort(message.request_id, message.index, reason=message.reason)
            return True
        if isinstance(message, Detach):
            self._moves.detach(core, message)
            return True
        if isinstance(message, Attach):
            self._moves.attach(core, message)
            return True
        if isinstance(message, Piece):
            self._moves.take(message.piece)
            return False
        if isinstance(message, Ping):
            self._send(Pong(number=message.number))
        elif isinstance(message, Shutdown):
            self._stopping = True
        elif isinstance(message, BrokenStream):
            raise message
        elif isinstance(message, (Start, Load)):
            self._send(Problem(code="protocol_error", message="The engine has started already."))
        else:
            logger.error("%s", message)
            self._send(Problem(code=message.code, message=message.message))
        return False

    def _add(self, core: EngineCore, message: AddRequest) -> bool:
        try:
            core.add(message)
        except InvalidRequest as error:
            self._send(Problem(code=error.code, message=error.message))
            return False
        return True

    def _send(self, message: FromEngine) -> None:
        try:
            self._connection.sendall(frame(encode(message)))
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux).

    Elsewhere, and for what happened before the call, the end of the socket does it.

    Args:
        parent: process id of the parent.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None, use_errno=True)
        prctl: Callable[..., int] = library.prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def main(arguments: list[str]) -> int:
    """Run the process.

    Args:
        arguments: file descriptor of the socket, process id of the parent.

    Returns:
        The exit status.
    """
    gc.disable()  # Until the model is loaded there is much to make and nothing to collect.
    descriptor, parent = int(arguments[0]), int(arguments[1])
    die_with_parent(parent)
    with suppress(OSError):
        os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)  # Which is for results; what plugins print is none.
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s", force=True
    )
    connection = socket.socket(fileno=descriptor)
    inbox = Inbox(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, stack: inbox.put(Shutdown()))
    inbox.start()
    return EngineServer(connection, inbox).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
