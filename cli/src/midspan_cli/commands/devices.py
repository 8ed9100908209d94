"""``midspan devices``: what is here, what 'auto' would take, and why the rest is not here."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def devices(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List devices, and why others are absent.

    The names are those that --device takes. 'auto' takes the device of the highest preference; one below zero is taken
    only by name. What is not here is listed with the reason and what to do.
    """
    from midspan.devices.selection import AUTO, select_device
    from midspan.engine.cache_planning import readable_bytes
    from midspan_cli import device_listing
    from midspan_cli.text_table import table

    catalogue = device_listing.look_around()
    found, missing = device_listing.devices(catalogue), device_listing.absent(catalogue)
    warnings = device_listing.warnings(catalogue)
    best = select_device(catalogue, AUTO)
    if as_json:
        auto = {"id": best.info.id, "explanation": best.explanation}
        listing = {"devices": found, "auto": auto, "unavailable": missing, "warnings": warnings}
        typer.echo(json.dumps(listing, indent=2))
        return
    rows = [
        (
            item["id"] + ("  <- auto" if item["id"] == best.info.id else ""),
            readable_bytes(item["memory_bytes"]),
            str(item["preference"]),
            item["plugin"],
            item["description"],
        )
        for item in found
    ]
    typer.echo(table(("DEVICE", "MEMORY", "PREFERENCE", "PACKAGE", "DESCRIPTION"), rows))
    typer.echo("\n'auto' takes the highest preference. Below zero: only when asked for by name.")
    for item in missing:
        typer.echo(f"\n{item['name']} ({item['plugin']}) is not available: {item['reason']}")
        typer.echo(f"  {item['remedy']}")
    for warning in warnings:
        typer.secho(f"\nWarning: {warning}", fg="yellow")
