"""Makes the planned faults happen.

Knows no graph and no time. Invariants: a fault happens at its step and at no other; what hangs
is let go when the device is closed, from whatever thread; a lost device stays lost.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from midspan.errors import DeviceLost, OutOfDeviceMemory, UnsupportedOperation
from midspan.interface.graph import Graph
from midspan.interface.program import StepResult
from midspan_simulated.fault_plan import Fault


class FaultInjector:
    """Faults of one opened device.

    Args:
        device_id: for messages.
        faults: the plan.
        once: a file that stands for "it has happened"; None: faults happen in every device that is opened so.
    """

    def __init__(self, device_id: str, faults: Sequence[Fault], once: str | None = None) -> None:
        self._device_id = device_id
        self._once = None if once is None else Path(once)
        self._faults = tuple(faults)
        self._steps = 0
        self._lost = False
        self._released = threading.Event()

    def release(self) -> None:
        """Let what hangs go on; called when the device closes."""
        self._released.set()

    def corrupts_kernels(self) -> bool:
        """Whether the device's own linear kernel shall be wrong."""
        return self._happens("kernel", None)

    def before_compile(self, graph: Graph) -> None:
        """Fail where a compiler fails.

        Raises:
            DeviceLost, UnsupportedOperation: as planned.
        """
        self._require_device()
        if self._happens("compile", None):
            raise UnsupportedOperation(
                f"Device '{self._device_id}' compiles nothing, as its option fault=compile asks.",
                node=graph.nodes[0].name if graph.nodes else "",
                remedy="Leave the option out.",
            )

    def before_allocation(self) -> None:
        """Fail where memory is taken.

        Raises:
            DeviceLost, OutOfDeviceMemory: as planned.
        """
        self._require_device()
        if self._happens("allocate", None):
            raise OutOfDeviceMemory(
                f"Device '{self._device_id}' allocates no cache, as its option fault=allocate asks.",
                remedy="Leave the option out.",
            )

    def begin_step(self) -> int:
        """Count a step; fail or hang where the plan says so.

        Returns:
            The step's number.

        Raises:
            DeviceLost, OutOfDeviceMemory: as planned.
        """
        self._require_device()
        self._steps += 1
        step = self._steps
        if self._happens("lost", step):
            self._lost = True
            self._require_device()
        if self._happens("oom", step):
            raise OutOfDeviceMemory(f"Step {step} does not fit into device '{self._device_id}', as its option asks.")
        if self._happens("hang", step):
            self._released.wait()
            self._lost = True
            raise DeviceLost(f"Device '{self._device_id}' was closed while step {step} hung, as its option asks.")
        return step

    def end_step(self, step: int, result: StepResult, vocab_size: int) -> StepResult:
        """The step's result, spoiled where the plan says so.

        Args:
            step: from ``begin_step``.
            result: the right one.
            vocab_size: wrong tokens stay below it.
        """
        if self._happens("wrong", step):
            result = replace(result, token_ids=((result.token_ids + 1) % vocab_size).astype(np.int32))
        if self._happens("nan", step):
            result = replace(result, invalid=np.ones(result.token_ids.shape, np.bool_))
        return result

    def _happens(self, kind: str, step: int | None) -> bool:
        if Fault(kind=kind, step=step) not in self._faults:
            return False
        if self._once is not None:
            if self._once.exists():
                return False
            self._once.touch()
        return True

    def _require_device(self) -> None:
        if self._lost:
            raise DeviceLost(
                f"Device '{self._device_id}' is lost, as its option fault=... asks.", remedy="Open it again."
            )
