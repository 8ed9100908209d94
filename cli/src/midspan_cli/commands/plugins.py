"""``midspan plugins``: what is installed, and what cannot be used, with its traceback."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

MILLISECONDS = 1000


def plugins(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List plugins, and errors in loading them.

    A plugin is an installed package that brings devices, model architectures or readers of quantized models. Each is
    shown with the version of the interface that it was built against, and how long its import and its probe took; one
    that cannot be used, with why.
    """
    from midspan.devices.interface_version import version_text
    from midspan.interface import INTERFACE_VERSION
    from midspan_cli import device_listing
    from midspan_cli.text_table import table

    listed = device_listing.plugins(device_listing.look_around())
    interface = version_text(INTERFACE_VERSION)
    if as_json:
        typer.echo(json.dumps({"interface": interface, "plugins": listed}, indent=2))
        return
    typer.echo(f"This core speaks version {interface} of the plugin interface.\n")
    heading = ("PLUGIN", "PACKAGE", "INTERFACE", "IMPORT", "PROBE", "STATUS", "DEVICES")
    typer.echo(table(heading, [_row(item) for item in listed]))
    for item in listed:
        if item["status"] == device_listing.FAILED:
            typer.secho(f"\n{item['name']} ({item['distribution']}) failed: {item['error']}", fg="red")
            typer.echo(f"  {item['remedy']}\n{item['traceback'].rstrip()}")
        elif item["status"] == device_listing.UNAVAILABLE:
            typer.echo(f"\n{item['name']} is not available: {item['reason']}\n  {item['remedy']}")
        for warning in item["warnings"]:
            typer.secho(f"\nWarning: {warning}", fg="yellow")


def _row(item: dict[str, Any]) -> tuple[str, ...]:
    ids = item["devices"]
    return (
        item["name"],
        f"{item['distribution']} {item['version']}",
        item["interface"] or "-",
        _milliseconds(item["import_seconds"]),
        _milliseconds(item["probe_seconds"]),
        item["status"],
        f"{ids[0]} and {len(ids) - 1} more" if len(ids) > 1 else "".join(ids) or "-",
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * MILLISECONDS:.0f} ms"
