"""What this plugin reads from the environment, once, here and nowhere else.

``MIDSPAN_SIMULATED_PROBE_SECONDS``: how long the probe takes, for those who want to see what a
slow probe does; a device option cannot say it, because options are read when a device is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from midspan.errors import SettingsError

PROBE_SECONDS = "MIDSPAN_SIMULATED_PROBE_SECONDS"
LONGEST_PROBE = 3600.0


@dataclass(frozen=True, kw_only=True)
class SimulatedEnvironment:
    """What the environment says.

    Attributes:
        probe_seconds: how long the probe waits before it answers.
    """

    probe_seconds: float = 0.0


def read_simulated_environment(variables: Mapping[str, str] | None = None) -> SimulatedEnvironment:
    """Read the variables given, or those of the process.

    Raises:
        SettingsError: a value that is no number of seconds.
    """
    env = os.environ if variables is None else variables
    text = env.get(PROBE_SECONDS) or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_PROBE:
        raise SettingsError(
            f"{PROBE_SECONDS}={text!r} is no number of seconds from 0 to {LONGEST_PROBE:.0f}.",
            remedy="Correct it, or unset it.",
        )
    return SimulatedEnvironment(probe_seconds=seconds)
