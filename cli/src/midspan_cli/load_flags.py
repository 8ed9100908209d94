"""The flags that say what load ``bench`` sends; names are vLLM's where vLLM has the flag."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midspan.errors import SettingsError
from midspan_cli.goals import Goal, parse_goals

if TYPE_CHECKING:
    from midspan.engine.planned_load import LoadShape

LOAD = "Load"


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """Flags of the load, whoever serves it."""

    num_prompts: Annotated[int, typer.Option(min=1, help="Requests.", rich_help_panel=LOAD)] = 64
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.", rich_help_panel=LOAD)] = 128
    output_len: Annotated[
        int, typer.Option(min=1, help="Tokens to generate for each prompt.", rich_help_panel=LOAD)
    ] = 128
    random_range_ratio: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Lengths vary by so much to both sides; 0.5: half to 1.5 times.", rich_help_panel=LOAD
        ),
    ] = 0.0
    request_rate: Annotated[
        float,
        typer.Option(metavar="RATE", help="Requests that arrive in a second; inf: all at once.", rich_help_panel=LOAD),
    ] = math.inf
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight at most. Default: no limit.", rich_help_panel=LOAD)
    ] = None
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Requests before, of two output tokens, not counted.", rich_help_panel=LOAD)
    ] = 1
    goodput: Annotated[
        list[str],
        typer.Option(
            metavar="METRIC:MS ...",
            help="Latencies to keep, of ttft, tpot and e2el, in milliseconds: ttft:200 tpot:50.",
            rich_help_panel=LOAD,
        ),
    ] = field(default_factory=list)
    find_rate: Annotated[
        bool,
        typer.Option("--find-rate", help="Find the largest rate that keeps --goodput at p99.", rich_help_panel=LOAD),
    ] = False

    def goals(self) -> tuple[Goal, ...]:
        """The latencies to keep.

        Raises:
            SettingsError: one is no known metric and number, or comes twice; or there is none to find a rate for.
        """
        goals = parse_goals(self.goodput)
        if self.find_rate and not goals:
            raise SettingsError(
                "--find-rate needs to know what rate is good enough.",
                remedy="Say what latencies to keep, in milliseconds: --goodput ttft:200 tpot:50.",
            )
        if self.find_rate and (not math.isinf(self.request_rate) or self.max_concurrency is not None):
            raise SettingsError(
                "--find-rate tries rates of its own, without a limit of requests in flight.",
                remedy="Leave out --request-rate and --max-concurrency.",
            )
        return goals

    def shape(self, seed: int) -> LoadShape:
        """The load without its rate.

        Raises:
            SettingsError: the range ratio or the rate cannot be.
        """
        from midspan.engine.planned_load import LoadShape, check_rate

        check_rate(self.request_rate)
        return LoadShape(
            count=self.num_prompts,
            input_tokens=self.input_len,
            output_tokens=self.output_len,
            range_ratio=self.random_range_ratio,
            seed=seed,
        )


def described_load(shape: LoadShape, rate: float, max_concurrency: int | None) -> dict[str, Any]:
    """A load for a report."""
    return {
        "num_prompts": shape.count,
        "input_len": shape.input_tokens,
        "output_len": shape.output_tokens,
        "random_range_ratio": shape.range_ratio,
        "request_rate": None if math.isinf(rate) else rate,
        "max_concurrency": max_concurrency,
        "seed": shape.seed,
    }
