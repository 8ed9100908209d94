"""The version of the device interface, apart from the version of the core.

A plugin states the version that it was built against. It loads when the major
is equal and its minor is not newer than the core's; minors only add optional
fields with a default.
"""

from __future__ import annotations

INTERFACE_VERSION: tuple[int, int] = (0, 9)
"""(major, minor) of the contract in this package."""
