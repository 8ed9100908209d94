"""Runs loads on a model that is loaded in this process, on the host's time or the device's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from midspan.engine.load_clocks import HostClock, LoadClock, VirtualClock
from midspan.engine.load_drive import DriveMoment, DrivenLoad, drive_load, ignore_moment
from midspan.engine.loading import LoadedModel
from midspan.engine.planned_load import LoadShape, PlannedRequest, plan_arrivals, plan_requests
from midspan.engine.step_loop import EngineCore
from midspan.errors import SettingsError
from midspan.settings import EngineSettings
from midspan_cli.goals import Goal
from midspan_cli.live_line import LiveLine
from midspan_cli.load_report import summarize

PROMPT_SEED, WARM_UP_SEED = 0, 1
MODELLED, MEASURED = "modelled", "measured"


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalLoad:
    """A load for a loaded model.

    Attributes:
        loaded: the model.
        settings: with which it was loaded.
        shape: of the load.
        max_concurrency: requests in flight at most; None: no limit.
        host_seconds_per_step: what each step takes beside the device, where the device has a clock of its own.
        line: shows how far a run is.
    """

    loaded: LoadedModel
    settings: EngineSettings
    shape: LoadShape
    max_concurrency: int | None
    host_seconds_per_step: float | None
    line: LiveLine

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            SettingsError: a request is longer than the model's context, or a flag does not belong to the device.
        """
        longest, limit = self.shape.longest_request(), self.loaded.info.max_model_len
        if longest > limit:
            raise SettingsError(
                f"A request of this load has up to {longest} tokens, and the model takes {limit} here.",
                remedy="Lower --input-len or --output-len, or raise --max-model-len where model and memory allow it.",
            )
        if self.host_seconds_per_step is not None and not self._is_modelled():
            raise SettingsError(
                f"--host-seconds-per-step is for devices with a clock of their own, and {self.loaded.info.device} "
                "runs in the host's time, which holds the host's share already.",
                remedy="Leave it out.",
            )

    def warm_up(self, count: int) -> None:
        """Run some short requests of which nothing is noted; their prompts are not those that are measured."""
        if count:
            shape = self.shape.warm_up(count)
            requests = plan_requests(shape, self.loaded.info.vocab_size, prompt_seed=WARM_UP_SEED)
            self._drive(requests, plan_arrivals(shape, math.inf), ignore_moment)

    def measure(self, rate: float, goals: Sequence[Goal]) -> dict[str, Any]:
        """The figures of the load at a rate, on an engine that nobody has used before."""
        requests = plan_requests(self.shape, self.loaded.info.vocab_size, prompt_seed=PROMPT_SEED)
        driven = self._drive(requests, plan_arrivals(self.shape, rate), self._show)
        info, busy = self.loaded.info, driven.device_seconds
        return {
            "model": info.name,
            "device": info.device,
            "dtype": info.dtype,
            "load_format": self.settings.load_format,
            "quantization": info.quantization,
            "time": MODELLED if self._is_modelled() else MEASURED,
            "computed_seconds": driven.computed_seconds,
            **summarize(
                driven.timings,
                input_tokens=sum(len(request.prompt_ids) for request in requests),
                seconds=driven.seconds,
                goals=goals,
            ),
            "engine": {
                "steps": driven.steps,
                "preemptions": driven.preemptions,
                "cache_tokens": info.cache_tokens,
                "cache_usage_peak": driven.cache_usage_peak,
                "device_busy": None if busy is None else busy / max(driven.seconds, busy, 1e-9),
                "host_seconds_per_step": self._host_seconds() if self._is_modelled() else None,
            },
        }

    def _drive(
        self, requests: Sequence[PlannedRequest], arrivals: Sequence[float], watch: Callable[[DriveMoment], None]
    ) -> DrivenLoad:
        clock: LoadClock = HostClock()
        if self._is_modelled():
            clock = VirtualClock(host_seconds_per_step=self._host_seconds())
        core = EngineCore(self.loaded, self.settings, clock=clock.now)
        return drive_load(core, requests, arrivals, clock, max_concurrency=self.max_concurrency, watch=watch)

    def _is_modelled(self) -> bool:
        return self.loaded.device.capabilities.virtual_clock

    def _host_seconds(self) -> float:
        return self.host_seconds_per_step or 0.0

    def _show(self, moment: DriveMoment) -> None:
        if self.line.is_due():
            statistics = moment.statistics
            self.line.show(
                f"{moment.finished}/{self.shape.count} requests, {statistics.running} running, "
                f"{statistics.waiting} waiting, at {moment.now:.1f} s"
            )
