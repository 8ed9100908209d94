"""Which commands there are, without importing any of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CommandEntry:
    """One command.

    Attributes:
        name: as it is typed.
        summary: one line for the list of commands.
        panel: heading under which the list shows it.
        function: name of the function in ``midspan_cli.commands.<name>`` that runs it.
    """

    name: str
    summary: str
    panel: str
    function: str


GENERATE = "Generate"
MODELS = "Models"
MACHINE = "This machine"

COMMANDS: tuple[CommandEntry, ...] = (
    CommandEntry(name="serve", summary="Serve a model with the OpenAI API.", panel=GENERATE, function="serve"),
    CommandEntry(name="run", summary="Continue one prompt and print the text.", panel=GENERATE, function="run"),
    CommandEntry(name="chat", summary="Talk to a model, or to a running server.", panel=GENERATE, function="chat"),
    CommandEntry(name="bench", summary="Measure speed, or plan capacity.", panel=GENERATE, function="bench"),
    CommandEntry(name="pull", summary="Download a model and print where it lies.", panel=MODELS, function="pull"),
    CommandEntry(name="graph", summary="Print a model's graph.", panel=MODELS, function="graph"),
    CommandEntry(name="devices", summary="List devices, and why others are absent.", panel=MACHINE, function="devices"),
    CommandEntry(
        name="plugins", summary="List plugins, and errors in loading them.", panel=MACHINE, function="plugins"
    ),
    CommandEntry(name="plugin", summary="Start a device plugin of your own.", panel=MACHINE, function="plugin"),
    CommandEntry(name="doctor", summary="Check this machine, and a model on it.", panel=MACHINE, function="doctor"),
    CommandEntry(
        name="config", summary="Show the settings in effect and their origin.", panel=MACHINE, function="config"
    ),
)


def find(name: str) -> CommandEntry | None:
    """The command of that name, or None."""
    return next((entry for entry in COMMANDS if entry.name == name), None)
