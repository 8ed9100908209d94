"""``midspan graph``: a model as the graph that devices get. Reads no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from midspan.settings import read_environment
from midspan_cli.startup_display import StartupDisplay

NO_PASS = "none"


def graph(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, hub name or pypi:PACKAGE.")],
    *,
    after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="Stop after this pass; 'none' shows what the builder made."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON that can be read back.")] = False,
) -> None:
    """Print a model's graph.

    The graph is what a device compiles: operations with their inputs, weights and shapes. No weight is read, so a
    folder with config.json is enough. --after none shows it as the model's builder made it, before fusion.
    """
    from midspan.devices.discovery import architectures, load_plugins
    from midspan.errors import SettingsError
    from midspan.graph.passes import PASSES, apply_passes
    from midspan.graph.printing import format_graph
    from midspan.graph.serialization import graph_to_json
    from midspan.models.catalogue import build_graph
    from midspan.weights.checkpoint import open_checkpoint
    from midspan.weights.resolve import resolve_model

    if after is not None and after != NO_PASS and after not in PASSES:
        raise SettingsError(
            f"There is no graph pass {after!r}.", remedy=f"Passes, in order: {NO_PASS}, {', '.join(PASSES)}."
        )
    with StartupDisplay() as display:
        path = resolve_model(model, environment=read_environment(), revision=revision, report=display.report_download)
        config_alone = (path / "config.json").is_file()
        checkpoint = open_checkpoint(path, weights=not config_alone)
        built = build_graph(checkpoint.config, architectures=architectures(load_plugins()))
    if after != NO_PASS:
        built = apply_passes(built, until=after)
    typer.echo(graph_to_json(built) if as_json else format_graph(built))
