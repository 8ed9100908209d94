"""The entry point: parses the command line and runs one command.

Imports Typer and nothing heavier. Errors that the program raises on purpose are
shown as a message and a remedy, with status 1; wrong usage has status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from midspan_cli.command_group import CommandGroup

DEBUG_FLAG = "--debug"
END_OF_FLAGS = "--"


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


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status.
    """
    words, debug = _without_debug(arguments)
    try:
        create_cli()(words, prog_name="midspan")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Exception as error:
        from midspan_cli.failure_report import report_failure

        return report_failure(error, debug=debug)
    return 0


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """``--debug`` may stand anywhere before ``--``, as people add it at the end."""
    words = list(arguments)
    limit = words.index(END_OF_FLAGS) if END_OF_FLAGS in words else len(words)
    flags = [word for word in words[:limit] if word != DEBUG_FLAG]
    return flags + words[limit:], len(flags) < limit


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
