"""The group of all commands, which imports a command when it is asked for.

Listing the commands imports none of them. A name that is not built in is looked
for in the installed plugins, through their ``midspan_commands`` hook; plugins are
loaded for no other reason, so that they cannot slow down the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from midspan_cli.command_table import COMMANDS, CommandEntry, find
from midspan_cli.flag_records import with_records

OPTIONS = "Options"
NAMED_NUMBER = re.compile(r"\w+:[\d.]+")


class CommandGroup(TyperGroup):
    """The root command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands that are known without loading plugins."""
        return [entry.name for entry in COMMANDS] + [name for name in self.commands if find(name) is None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        entry = find(cmd_name)
        if cmd_name not in self.commands:
            if entry is not None:
                self.commands[cmd_name] = load(entry)
            else:
                self._load_all()
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the built-in commands under their headings, without importing them."""
        width = max(len(entry.name) for entry in COMMANDS)
        for panel in dict.fromkeys(entry.panel for entry in COMMANDS):
            with formatter.section(panel):
                formatter.write_dl(
                    [(entry.name.ljust(width), entry.summary) for entry in COMMANDS if entry.panel == panel]
                )

    def _load_all(self) -> None:
        for name, command in plugin_commands().items():
            self.commands.setdefault(name, command)
        for entry in COMMANDS:
            self.commands.setdefault(entry.name, TyperCommand(entry.name, help=entry.summary))


class PlainHelp(TyperCommand):
    """A command whose help is plain text, its flags under headings.

    Names of flags are never cut, however narrow the terminal is. A flag whose metavar ends in ``...`` takes
    several ``NAME:NUMBER`` words at once.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the flag repeated before each further word that it takes."""
        flags = {
            name for option in self.get_params(ctx) if str(option.metavar or "").endswith("...") for name in option.opts
        }
        words: list[str] = []
        current: str | None = None
        for previous, word in zip(["", *args], args, strict=False):
            if word.partition("=")[0] in flags:
                current = word.partition("=")[0]
            elif current is not None and previous != current:
                if NAMED_NUMBER.fullmatch(word):
                    words.append(current)
                else:
                    current = None
            words.append(word)
        parsed: list[str] = super().parse_args(ctx, words)
        return parsed

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the flags of each heading."""
        arguments, panels = [], dict[str, list[tuple[str, str]]]()
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            else:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or OPTIONS, []).append(record)
        for heading, records in (("Arguments", arguments), *panels.items()):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def load(entry: CommandEntry) -> Any:
    """Import a command and build its parser."""
    module = import_module(f"midspan_cli.commands.{entry.name}")
    return build(entry.name, getattr(module, entry.function))


def build(name: str, function: Callable[..., None]) -> Any:
    """The parser of one command function."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name, cls=PlainHelp)(with_records(function))
    command = typer.main.get_command(app)
    command.name = name
    return command


def plugin_commands() -> dict[str, Any]:
    """Commands that installed plugins bring, by name. A plugin that fails here is left out."""
    from midspan.devices.discovery import load_plugins

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_nothing)
    for implementation in load_plugins().manager.hook.midspan_commands.get_hookimpls():
        try:
            implementation.function(app)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            typer.secho(
                f"The plugin '{implementation.plugin_name}' failed to add its commands: {error!r}",
                fg="yellow",
                err=True,
            )
    group = typer.main.get_command(app)
    return dict(group.commands) if isinstance(group, TyperGroup) else {}


def _nothing() -> None:
    """Commands of plugins."""
