"""Prints an error as one message with its remedy, and chooses the exit status."""

from __future__ import annotations

import sys
import traceback

import typer

from midspan.errors import MidspanError

FAILURE = 1


def report_failure(error: Exception, *, debug: bool) -> int:
    """Print ``error`` to standard error.

    Args:
        error: what ended the command.
        debug: print its traceback as well.

    Returns:
        The exit status.
    """
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    if isinstance(error, MidspanError):
        typer.secho(f"Error: {error.message}", fg="red", err=True)
        if error.remedy:
            typer.echo(error.remedy, err=True)
        return FAILURE
    typer.secho(f"Error: {type(error).__name__}: {error}", fg="red", err=True)
    if not debug:
        typer.echo("This is a fault of the program. Run it again with --debug to see where.", err=True)
    return FAILURE
