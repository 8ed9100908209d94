"""A device that is closed while a thread of the same process runs steps on it.

Knows no more of the device than its name. The process ends with an answer, or with what the device
made of it.
"""

from __future__ import annotations

import threading
from typing import Any

from midspan.conformance.child_process import answer
from midspan.conformance.stepping import Stepping
from midspan.conformance.subject import Subject, open_subject

STEPS_BEFORE = (1, 10)
"""Steps after which the device is closed, a round each."""


def close_under_load(arguments: dict[str, Any]) -> dict[str, Any]:
    """Open a device, let a thread run steps, and close the device meanwhile.

    Args:
        arguments: ``device`` and ``options``; ``seconds`` in which the thread must have come so far, or ended.

    Returns:
        ``rounds``: for each what the thread came to: its error's type, or ``hangs``, ``goes on`` or ``never ran``.
    """
    subject = open_subject(arguments["device"], arguments["options"])
    return {"rounds": [_round(subject, steps, float(arguments["seconds"])) for steps in STEPS_BEFORE]}


def _round(subject: Subject, steps: int, seconds: float) -> str:
    device = subject.plugin.open(subject.info, subject.options)
    stepping = Stepping(device)
    came_so_far, stop, ended = threading.Event(), threading.Event(), threading.Event()
    outcome = ["hangs"]

    def work() -> None:
        done = 0
        try:
            while not stop.is_set():
                stepping.step()
                done += 1
                if done >= steps:
                    came_so_far.set()
            outcome[0] = "goes on"
        except Exception as error:
            outcome[0] = type(error).__name__
        finally:
            came_so_far.set()
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    if not came_so_far.wait(seconds):
        return "never ran"
    device.close()
    if not ended.wait(seconds):
        stop.set()
        ended.wait(seconds)
    return outcome[0]


if __name__ == "__main__":
    answer(close_under_load)
