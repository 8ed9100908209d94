"""``midspan devices``: what is here, and why the rest is not."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def devices(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List devices, and why others are absent."""
    from midspan.devices.discovery import discover
    from midspan_cli import device_listing
    from midspan_cli.text_table import table

    catalogue = discover()
    found, missing = device_listing.devices(catalogue), device_listing.absent(catalogue)
    if as_json:
        typer.echo(json.dumps({"devices": found, "unavailable": missing}, indent=2))
        return
    rows = [
        (item["id"], device_listing.readable(item["memory_bytes"]), str(item["preference"]), item["description"])
        for item in found
    ]
    typer.echo(table(("DEVICE", "MEMORY", "PREFERENCE", "DESCRIPTION"), rows))
    for item in missing:
        typer.echo(f"\n{item['name']} is not available: {item['reason']}")
        typer.echo(f"  {item['remedy']}")
