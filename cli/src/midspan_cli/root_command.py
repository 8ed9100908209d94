"""The root of the command line: the group of all commands and its own flags.

Imports Typer and nothing heavier, and no command.
"""

from __future__ import annotations

from typing import Annotated

import typer

from midspan_cli.command_group import CommandGroup

DEBUG_FLAG = "--debug"


def create_cli() -> typer.Typer:
    """The Typer application of all commands.

    The list of commands is plain text: drawing it would take longer than all the rest.
    """
    app = typer.Typer(
        name="midspan",
        cls=CommandGroup,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from midspan import __version__

        typer.echo(f"midspan {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG_FLAG, help="Show tracebacks of errors.")] = False,
) -> None:
    """Run and serve language models on any hardware."""
