"""``midspan plugins``: what is installed, and what failed to load with its traceback."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def plugins(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List plugins, and errors in loading them."""
    from midspan.devices.discovery import discover
    from midspan.interface import INTERFACE_VERSION
    from midspan_cli import device_listing
    from midspan_cli.text_table import table

    listed = device_listing.plugins(discover())
    interface = ".".join(str(part) for part in INTERFACE_VERSION)
    if as_json:
        typer.echo(json.dumps({"interface": interface, "plugins": listed}, indent=2))
        return
    rows = [
        (item["name"], f"{item['distribution']} {item['version']}", item.get("interface", "-"), item["status"])
        for item in listed
    ]
    typer.echo(f"This core speaks version {interface} of the plugin interface.\n")
    typer.echo(table(("PLUGIN", "PACKAGE", "INTERFACE", "STATUS"), rows))
    for item in listed:
        if item["status"] == "failed":
            typer.secho(f"\n{item['name']} failed: {item['error']}", fg="red")
            typer.echo(item["traceback"].rstrip())
