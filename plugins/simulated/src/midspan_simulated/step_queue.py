"""Steps that run when somebody waits for them, in the order in which they were started.

What an asynchronous device looks like from the host: ``run`` returns before anything was done.
Knows steps as functions only. Invariant: whatever is waited for, all steps started before it
run first; a step runs once, and its error is raised to everybody who asks for its result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from midspan.errors import MidspanError
from midspan.interface.program import FinishedStep, StepOutput, StepResult


class StepQueue:
    """The steps of one device.

    Args:
        asynchronous: False: each runs at once, when it is started.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._waiting: deque[PendingStep] = deque()
        self._running = threading.RLock()
        self._closed = False

    def start(self, work: Callable[[], StepResult]) -> StepOutput:
        """Start a step.

        Args:
            work: does it.
        """
        if not self._asynchronous:
            return FinishedStep(step_result=work())
        step = PendingStep(self, work)
        self._waiting.append(step)
        return step

    def finish(self) -> None:
        """Run all that waits; errors stay with their steps."""
        with self._running:
            while self._waiting and not self._closed:
                self._waiting.popleft().run()

    def finish_until(self, step: PendingStep) -> None:
        """Run what was started before a step, and the step."""
        with self._running:
            while not step.is_done():
                if self._closed or not self._waiting:
                    raise MidspanError("The device was closed before the step ran.")
                self._waiting.popleft().run()

    def close(self) -> None:
        """Run nothing any more; does not wait for a step that runs."""
        self._closed = True


class PendingStep:
    """A step that has not run yet, or has. Made by ``StepQueue``."""

    def __init__(self, queue: StepQueue, work: Callable[[], StepResult]) -> None:
        self._queue = queue
        self._work: Callable[[], StepResult] | None = work
        self._result: StepResult | None = None
        self._error: Exception | None = None

    def is_done(self) -> bool:
        """Whether it has run."""
        return self._work is None

    def run(self) -> None:
        """Run it, and keep what came of it."""
        work = self._work
        if work is None:
            return
        try:
            self._result = work()
        except Exception as error:
            self._error = error
        finally:
            self._work = None

    def result(self) -> StepResult:
        """Wait for the step, and for those before it."""
        if not self.is_done():
            self._queue.finish_until(self)
        if self._result is None:
            raise self._error or MidspanError("The step was interrupted.")
        return self._result
