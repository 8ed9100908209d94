"""Steps that may end their process, run in one of their own, each with an outcome.

A step that ends the process is known, since what came of a step is written down before
the next begins; the steps after it get another process. Knows no step.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from midspan.conformance.check import CheckFailed
from midspan.conformance.child_process import ChildEnd, device_arguments, run_children
from midspan.conformance.subject import Subject, open_subject
from midspan.devices.contract import error_text
from midspan.errors import MidspanError

SECONDS = 120.0
"""For one process."""

Steps = Mapping[str, Callable[[Subject], None]]
"""Name -> what it does; it raises when something is wrong."""


def run_steps(subject: Subject, module: str, names: Sequence[str]) -> dict[str, str]:
    """Run the steps of a module of ``midspan.conformance.children``.

    Args:
        subject: whose device they open; its shared one is closed before.
        module: its name.
        names: of the steps, in order.

    Returns:
        What is wrong with each, "" for nothing.
    """
    subject.close()  # Some devices can be open in one process at a time.
    outcomes: dict[str, str] = {}
    while len(outcomes) < len(names):
        left = [name for name in names if name not in outcomes]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "steps")
            arguments = device_arguments(subject, steps=left, file=str(file))
            (end,) = run_children(f"midspan.conformance.children.{module}", [arguments], seconds=SECONDS)
            lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
        outcomes.update({line[0]: line[1] for line in lines if len(line) > 1})
        if end.answer is None:
            broken = next((name for name in left if name not in outcomes), left[-1])
            outcomes[broken] = outcomes.get(broken) or _ending(end)
    return outcomes


def step(name: str, outcomes: Callable[[], Mapping[str, str]]) -> None:
    """A check's body: fails with what is wrong with one step.

    Raises:
        CheckFailed: something is.
    """
    problem = outcomes()[name]
    if problem:
        raise CheckFailed(problem)


def take_steps(steps: Steps, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: run steps and write each one's outcome down.

    Args:
        steps: of this module.
        arguments: ``device``, ``options``, ``steps`` and the ``file`` to write to: a line with a
            step's name when it begins, and one with its name and what is wrong when it ends.
    """
    subject = open_subject(arguments["device"], arguments["options"])
    with Path(arguments["file"]).open("a", encoding="utf-8") as file:
        for name in arguments["steps"]:
            print(json.dumps([name]), file=file, flush=True)
            print(json.dumps([name, _problem(steps[name], subject)]), file=file, flush=True)
    return {}


def _problem(body: Callable[[Subject], None], subject: Subject) -> str:
    try:
        body(subject)
    except CheckFailed as failure:
        return str(failure)
    except MidspanError as error:
        return error_text(error)
    except Exception:
        return traceback.format_exc()
    return ""


def _ending(end: ChildEnd) -> str:
    try:
        end.require("The process")
    except CheckFailed as failure:
        return str(failure)
    return ""
