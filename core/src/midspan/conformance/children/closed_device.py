"""What was closed is used again, in a process that it may crash.

Each use is written down before it begins, so that the parent knows which one ended the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from midspan.conformance.child_process import answer
from midspan.conformance.stepping import Stepping
from midspan.conformance.subject import open_subject
from midspan.interface import Device

Closing = Callable[[Stepping, Device], None]


def _close_program(stepping: Stepping, device: Device) -> None:
    stepping.program.close()


def _close_cache(stepping: Stepping, device: Device) -> None:
    stepping.cache.close()


def _close_device(stepping: Stepping, device: Device) -> None:
    device.close()


def _read(stepping: Stepping) -> Any:
    return stepping.cache.read(stepping.layout.groups[0].name, [0])


def _write(stepping: Stepping) -> Any:
    group = stepping.layout.groups[0]
    shape = (group.layers, 2, 1, stepping.layout.block_size, group.kv_heads, max(group.key_size, group.value_size))
    return stepping.cache.write(group.name, [0], np.zeros(shape, np.float32))


def _copy(stepping: Stepping) -> Any:
    return stepping.cache.copy(stepping.layout.groups[0].name, [(0, 1)])


USES: Mapping[str, tuple[Closing, Callable[[Stepping], Any]]] = {
    "running a closed program": (_close_program, Stepping.step),
    "running a program on a closed cache": (_close_cache, Stepping.step),
    "reading a closed cache": (_close_cache, _read),
    "writing a closed cache": (_close_cache, _write),
    "copying in a closed cache": (_close_cache, _copy),
    "running a program of a closed device": (_close_device, Stepping.step),
    "reading a cache of a closed device": (_close_device, _read),
}
"""What is done -> what is closed, and how it is used then."""


def use_what_is_closed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Use what was closed, one way after the other.

    Args:
        arguments: ``device``, ``options``, and the ``file`` to which a line is written for each use that
            begins.

    Returns:
        ``silent``: uses that raised nothing.
    """
    subject = open_subject(arguments["device"], arguments["options"])
    silent = []
    closed: dict[Closing, Stepping] = {}
    with Path(arguments["file"]).open("a", encoding="utf-8") as file:
        for name, (close, use) in USES.items():
            print(json.dumps(name), file=file, flush=True)
            if close not in closed:
                device = subject.plugin.open(subject.info, subject.options)
                closed[close] = Stepping(device)
                closed[close].step()
                close(closed[close], device)
            try:
                use(closed[close])
            except Exception:
                continue
            silent.append(name)
    return {"silent": silent}


if __name__ == "__main__":
    answer(use_what_is_closed)
