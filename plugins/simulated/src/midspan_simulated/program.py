"""A program of the simulated device: somebody's numbers, the model's time, the plan's faults.

Knows neither how numbers come about (the reference's definitions, or nothing at all) nor how time is
modelled. Invariant: a step's time is told with its result, and a fault never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from midspan.interface.batch import Batch, SamplingBatch
from midspan.interface.cache import Cache
from midspan.interface.program import Program, StepOutput, StepResult
from midspan_simulated.fault_injector import FaultInjector
from midspan_simulated.step_queue import StepQueue


class SimulatedProgram:
    """Implements ``interface.program.Program``.

    Args:
        program: where the numbers come from.
        vocab_size: of the model.
        queue: of the device.
        faults: of the device.
        clock: seconds that a batch takes; None: no time is told.
    """

    def __init__(
        self,
        program: Program,
        *,
        vocab_size: int,
        queue: StepQueue,
        faults: FaultInjector,
        clock: Callable[[Batch], float] | None,
    ) -> None:
        self.placement = program.placement
        self._program = program
        self._vocab_size = vocab_size
        self._queue = queue
        self._faults = faults
        self._clock = clock

    def run(self, batch: Batch, cache: Cache) -> StepOutput:
        """Execute one step; an asynchronous device does so when its result is asked for."""
        return self._queue.start(lambda: self._execute(batch, cache))

    def evaluate(
        self, inputs: Mapping[str, NDArray[Any] | SamplingBatch], cache: Cache | None = None
    ) -> tuple[NDArray[Any], ...]:
        """Execute the graph on any values; counts as no step."""
        self._queue.finish()
        return self._program.evaluate(inputs, cache)

    def memory_bytes(self) -> int:
        """Bytes of weights and working memory."""
        return self._program.memory_bytes()

    def close(self) -> None:
        """Release them."""
        self._program.close()

    def _execute(self, batch: Batch, cache: Cache) -> StepResult:
        step = self._faults.begin_step()
        result = self._program.run(batch, cache).result()
        if self._clock is not None:
            result = replace(result, device_seconds=self._clock(batch))
        return self._faults.end_step(step, result, self._vocab_size)
