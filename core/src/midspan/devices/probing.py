"""Asks probes what devices are here, all at once and none for too long.

Knows no hardware. Each probe runs in a thread of its own, so that asking all takes as
long as the slowest one, and a probe that does not answer in time is given up: its
thread is left behind and ends with the process.

Invariant: whatever a probe does short of ending the process, all others are heard.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from midspan.devices.contract import check_probe_answer
from midspan.errors import PluginError
from midspan.interface.plugin import DevicePlugin, Found, Unavailable

PROBE_DEADLINE_SECONDS = 5.0
"""A probe that has not answered by then has failed."""
SLOW_PROBE_SECONDS = 0.1
"""The interface's limit; a slower probe is used, and people are told."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeFailed:
    """A probe that raised, did not answer in time, or returned what is no probe result.

    Attributes:
        error: what it raised, or what is wrong with its answer.
        trace: the traceback as text.
    """

    error: BaseException
    trace: str


ProbeResult = Union[Found, Unavailable, ProbeFailed]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeOutcome:
    """What came of asking one probe.

    Attributes:
        result: its answer, or its failure.
        seconds: how long it took, or the deadline that it missed.
    """

    result: ProbeResult
    seconds: float


class _Asking:
    """One probe in its thread."""

    def __init__(self, plugin: DevicePlugin) -> None:
        self.plugin = plugin
        self.outcome: ProbeOutcome | None = None
        self._thread = threading.Thread(target=self._ask, name=f"probe of {plugin.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, seconds: float) -> ProbeOutcome | None:
        self._thread.join(seconds)
        return self.outcome

    def stack(self) -> str:
        """Where the thread is now."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _ask(self) -> None:
        begun = time.perf_counter()
        result: ProbeResult
        try:
            result = check_probe_answer(self.plugin, self.plugin.probe())
        except BaseException as error:
            result = ProbeFailed(error=error, trace=traceback.format_exc())
        self.outcome = ProbeOutcome(result=result, seconds=time.perf_counter() - begun)


def ask_probes(
    plugins: Sequence[DevicePlugin], *, deadline_seconds: float = PROBE_DEADLINE_SECONDS
) -> list[ProbeOutcome]:
    """Ask each plugin's probe once.

    Args:
        plugins: whose probes to ask.
        deadline_seconds: how long to wait for all of them together.

    Returns:
        The outcomes, in the order of the plugins.
    """
    begun = time.monotonic()
    asked = [_Asking(plugin) for plugin in plugins]
    for asking in asked:
        asking.start()
    outcomes = []
    for asking in asked:
        left = max(0.0, begun + deadline_seconds - time.monotonic())
        outcomes.append(asking.wait(left) or _unanswered(asking, deadline_seconds))
    return outcomes


def _unanswered(asking: _Asking, seconds: float) -> ProbeOutcome:
    name = asking.plugin.name
    error = PluginError(
        f"The probe of '{name}' did not answer within {seconds:g} s, and was given up.",
        plugin=name,
        remedy="Look whether its driver hangs; if not, upgrade the plugin or uninstall it.",
    )
    trace = f"The probe was still here:\n{asking.stack()}{type(error).__name__}: {error}\n"
    return ProbeOutcome(result=ProbeFailed(error=error, trace=trace), seconds=seconds)
