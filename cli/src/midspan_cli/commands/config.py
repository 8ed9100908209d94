"""``midspan config``: what ``serve`` would run with, and where each value comes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from midspan.settings import DEFAULT_MODEL, read_environment
from midspan_cli.commands.serve import ServerFlags
from midspan_cli.engine_flags import EngineFlags

FLAG = "flag"
DEFAULT = "default"
ENVIRONMENT = "environment"
HIDDEN = "(set)"


def config(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="As for serve.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    server: ServerFlags,
    engine: EngineFlags,
) -> None:
    """Show the settings in effect and their origin. Takes the flags of serve."""
    from midspan_cli.text_table import table

    engine.replica_settings(model or DEFAULT_MODEL)
    values: dict[str, Any] = {"model": model or DEFAULT_MODEL, **asdict(server), **asdict(engine)}
    entries = {name: (value, _origin(ctx, name)) for name, value in values.items()}
    entries |= _environment_entries(values["api_key"])
    if as_json:
        shown = {name: {"value": value, "origin": origin} for name, (value, origin) in entries.items()}
        typer.echo(json.dumps(shown, indent=2))
        return
    rows = [(name, _shown(value), origin) for name, (value, origin) in entries.items()]
    typer.echo(table(("SETTING", "VALUE", "ORIGIN"), rows))


def _origin(ctx: typer.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    return FLAG if source is not None and source.name == "COMMANDLINE" else DEFAULT


def _environment_entries(flag_keys: list[str]) -> dict[str, tuple[Any, str]]:
    given, plain = read_environment(), read_environment({})
    key_origin = FLAG if flag_keys else ENVIRONMENT if given.api_key else DEFAULT
    return {
        "api_key": (HIDDEN if flag_keys or given.api_key else None, key_origin),
        "cache_folder": (
            str(given.cache_folder),
            DEFAULT if given.cache_folder == plain.cache_folder else ENVIRONMENT,
        ),
        "offline": (given.offline, ENVIRONMENT if given.offline else DEFAULT),
    }


def _shown(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "-"
    return " ".join(value) if isinstance(value, list) else str(value)
