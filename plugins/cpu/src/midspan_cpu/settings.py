"""What this plugin reads from the environment, once, here and nowhere else.

``MIDSPAN_CPU_ISA``: the instruction set of the native kernels, instead of the fastest
proven one that the processor has: ``portable``, ``avx2``, ``avx512``, ``avx512vnni``;
``none`` turns the native kernels off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CpuEnvironment:
    """What the environment says.

    Attributes:
        instruction_set: the wanted one; None for the fastest proven one; ``"none"`` for no native kernels.
    """

    instruction_set: str | None = None


def read_cpu_environment(variables: Mapping[str, str] | None = None) -> CpuEnvironment:
    """Read the variables given, or those of the process."""
    env = os.environ if variables is None else variables
    return CpuEnvironment(instruction_set=env.get("MIDSPAN_CPU_ISA") or None)
