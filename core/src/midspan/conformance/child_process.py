"""Work that the suite does in processes of its own: it may hang, crash, or need several of them.

A task is a module with a function from plain data to plain data; what it is given and what it
gives travel as JSON. Knows no device: the task opens the one that it is told the name of.

Invariants: no child outlives the wait for it; a child that ends without an answer is a failure
with what it wrote to its error stream, and never a silent success.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midspan.conformance.check import CheckFailed
from midspan.conformance.subject import Subject

_MARK = "midspan-conformance-answer "
"""Before the answer; other lines on the output are the libraries' own."""
_SHOWN_CHARACTERS = 2000

Plain = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChildEnd:
    """How a child ended.

    Attributes:
        answer: what its task returned; None when it ended without.
        exit_code: of the process; negative: the signal that killed it; None: it was still running when
            its time was up, and was killed.
        errors: the end of its error stream.
    """

    answer: Plain | None
    exit_code: int | None
    errors: str

    def require(self, what: str) -> Plain:
        """The answer, or a failure that says what became of the child.

        Args:
            what: the child, for the message.

        Raises:
            CheckFailed: there is none.
        """
        if self.answer is not None:
            return self.answer
        raise CheckFailed(f"{what} {self._how()} and gave no answer.\n{self.errors}".rstrip())

    def ending(self) -> str:
        """How it ended, in a line: with the last line that it wrote to its error stream."""
        last = self.errors.strip().splitlines()[-1:]
        return f"{self._how()}: {last[0]}" if last else self._how()

    def _how(self) -> str:
        return "did not end in time" if self.exit_code is None else f"ended with code {self.exit_code}"


def device_arguments(subject: Subject, **more: Any) -> Plain:
    """What a task needs to open the subject's device, and more."""
    return {"device": subject.name, "options": dict(subject.options), **more}


def run_children(module: str, arguments: Sequence[Mapping[str, Any]], *, seconds: float) -> list[ChildEnd]:
    """Start a process for each set of arguments, all at once, and wait for all.

    Args:
        module: full name of the task's module.
        arguments: plain data.
        seconds: after which those that still run are killed.
    """
    children = [_start(module, item) for item in arguments]
    deadline = time.monotonic() + seconds
    try:
        return [_wait(child, deadline) for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.communicate()


def _start(module: str, arguments: Mapping[str, Any]) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if child.stdin is not None:
        child.stdin.write(json.dumps(arguments))
        child.stdin.close()
        child.stdin = None
    return child


def _wait(child: subprocess.Popen[str], deadline: float) -> ChildEnd:
    try:
        output, errors = child.communicate(timeout=max(0.0, deadline - time.monotonic()))
        exit_code: int | None = child.returncode
    except subprocess.TimeoutExpired:
        child.kill()
        output, errors = child.communicate()
        exit_code = None
    answer = None
    for line in output.splitlines():
        if line.startswith(_MARK):
            answer = json.loads(line.removeprefix(_MARK))
    return ChildEnd(answer=answer, exit_code=exit_code, errors=errors[-_SHOWN_CHARACTERS:])


def answer(task: Callable[[Plain], Plain]) -> None:
    """In the child: read the arguments, do the task, and write what it gave."""
    result = task(json.loads(sys.stdin.read()))
    sys.stdout.write(f"\n{_MARK}{json.dumps(result)}\n")
    sys.stdout.flush()
