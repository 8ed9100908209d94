"""Counts what a plugin rebinds in the core, in a process in which it was not loaded before."""

from __future__ import annotations

from typing import Any

from midspan.conformance.child_process import answer
from midspan.devices.rebinding import count_rebindings


def count(arguments: dict[str, Any]) -> dict[str, Any]:
    """Load, probe, open and close a plugin's device.

    Args:
        arguments: ``entry_point`` of the plugin, empty for what is built in; ``device`` and ``options``.

    Returns:
        ``rebound``: names of the core.
    """
    found = count_rebindings(arguments["entry_point"], arguments["device"], arguments["options"])
    return {"rebound": list(found)}


if __name__ == "__main__":
    answer(count)
