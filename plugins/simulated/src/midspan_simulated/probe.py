"""Names the devices: the plain one, and one for each data sheet. Imports nothing heavy."""

from __future__ import annotations

import time

from midspan.interface.device import DeviceInfo
from midspan.interface.plugin import Found
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.settings import read_simulated_environment

NAME = "simulated"

PREFERENCE = -100
"""Below the portable reference: nobody who asks for any device gets one that is not there."""

PLAIN_MEMORY_BYTES = 4 * 2**30
"""Of the plain device; enough for models that its numerics can serve."""


def probe() -> Found:
    """The plain device first, then the sheets in their order."""
    seconds = read_simulated_environment().probe_seconds
    if seconds:
        time.sleep(seconds)
    plain = DeviceInfo(
        id=NAME,
        description="simulated, exact numerics without a clock",
        memory_bytes=PLAIN_MEMORY_BYTES,
        preference=PREFERENCE,
    )
    sheets = [
        DeviceInfo(
            id=f"{NAME}:{sheet.name}",
            description=f"simulated {sheet.product}, modelled time",
            memory_bytes=sheet.memory_bytes,
            preference=PREFERENCE,
        )
        for sheet in DATA_SHEETS.values()
    ]
    return Found(devices=(plain, *sheets))
