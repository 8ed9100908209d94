"""The flags that say how to generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from midspan.decoding.sampling_params import SamplingParams

SAMPLING = "Sampling"

DIRECT_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags of every command that generates text; None: the model's own default."""

    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most probable token.", rich_help_panel=SAMPLING)
    ] = None
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.", rich_help_panel=SAMPLING)] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep the most probable tokens up to this sum.", rich_help_panel=SAMPLING)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep so many of the most probable tokens.", rich_help_panel=SAMPLING)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this share of the best.", rich_help_panel=SAMPLING),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages repetition.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[
        list[str], typer.Option(help="Text that ends the output; several are possible.", rich_help_panel=SAMPLING)
    ] = field(default_factory=list)

    def params(self, defaults: Mapping[str, Any], *, max_tokens: int | None, seed: int | None = None) -> SamplingParams:
        """Sampling parameters.

        Args:
            defaults: the model's own.
            max_tokens: where neither a flag nor the model says; None: up to the end of the context.
            seed: makes the tokens repeatable.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        from midspan.decoding.sampling_params import SamplingParams

        values: dict[str, Any] = {"max_tokens": max_tokens, **defaults}
        for name in (*DIRECT_FIELDS, "max_tokens"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return SamplingParams(**values, stop=tuple(self.stop), seed=seed)
