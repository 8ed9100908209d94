"""What the scheduler costs: microseconds per request and step, for schedule and update together.

No device and no model runs: tokens come from a list. Processor time is measured, so that other programs on
the machine disturb little. Four kinds of load, each with
growing numbers of running requests:

* decode: every request has one token in each step;
* mixed: the same, and in each step one request in a hundred ends and another, with a prompt of 256 tokens, comes;
* prefix: all requests share 512 tokens of their prompt; the cost of a request's admission (hashing and lookup
  of 32 blocks, and one step with 16 tokens of its own);
* storm: the cache holds half of what the requests want, so they keep losing their blocks; per request in a step,
  preemptions and admissions included.

The column "loops" divides by what a plain Python loop over requests takes at that moment, per request, so that
figures of different machines can be compared.

Run: python benchmarks/scheduler.py [--sizes 100,1000,10000] [--steps 64] [--profile decode]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import process_time
from types import MappingProxyType

from midspan.interface.cache import CacheGroup
from midspan.scheduling.block_manager import BlockManager
from midspan.scheduling.request import Request
from midspan.scheduling.scheduler import Scheduler

BLOCK_SIZE = 16
MAX_MODEL_LEN = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the table.

    Attributes:
        seconds: time spent in the scheduler.
        entries: requests in steps, summed over the steps.
        steps: how many steps were timed.
        note: what else is to be known.
    """

    seconds: float
    entries: int
    steps: int
    note: str = ""


class Load:
    """A scheduler under load, and a stopwatch around it."""

    def __init__(self, *, size: int, blocks: int, budget: int, window: int | None = None) -> None:
        groups = [CacheGroup(name="full", layers=1, kv_heads=1, key_size=64, value_size=64)]
        if window is not None:
            groups.append(CacheGroup(name="window", layers=1, kv_heads=1, key_size=64, value_size=64, window=window))
        self.scheduler = Scheduler(
            BlockManager(groups, blocks, BLOCK_SIZE),
            max_num_seqs=size,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
        )
        self.names = 0
        self.seconds = 0.0
        self.entries = 0
        self.steps = 0

    def add(self, prompt: list[int], total: int) -> None:
        """A request that is never told to stop by the load unless it is finished by name."""
        self.scheduler.add(Request(f"r{self.names}", prompt, max_total_tokens=total))
        self.names += 1

    def step(self) -> int:
        """One timed step; returns how many requests were in it."""
        tokens = [7] * self.scheduler.token_budget
        start = process_time()
        plan = self.scheduler.schedule()
        self.scheduler.update(plan, tokens[: plan.row_count])
        self.seconds += process_time() - start
        self.entries += len(plan)
        self.steps += 1
        return len(plan)

    def forget_time(self) -> None:
        """Start measuring here."""
        self.seconds, self.entries, self.steps = 0.0, 0, 0

    def measurement(self, note: str = "") -> Measurement:
        """What was measured since."""
        return Measurement(seconds=self.seconds, entries=self.entries, steps=self.steps, note=note)


def own_prompt(number: int, length: int) -> list[int]:
    """A prompt that differs from every other from its first token on."""
    return [number % 50_000, number // 50_000] + [index % 50_000 for index in range(length - 2)]


def decode(size: int, steps: int) -> Measurement:
    """Steady decoding, with a window group beside the full one."""
    load = Load(size=size, blocks=size * (4 + steps // BLOCK_SIZE) + 100, budget=64 * size, window=32)
    for number in range(size):
        load.add(own_prompt(number, 17 + number % BLOCK_SIZE), total=100 + steps)
    load.step()
    load.forget_time()
    for _ in range(steps):
        load.step()
    return load.measurement("full and window group")


def mixed(size: int, steps: int) -> Measurement:
    """Decoding while others end and come; the newcomers' prompts fill what the budget leaves."""
    turnover = max(1, size // 100)
    load = Load(size=size, blocks=size * (20 + steps // BLOCK_SIZE), budget=size + 256 * turnover)
    for number in range(size):
        load.add(own_prompt(number, 33), total=100 + steps)
    while load.step() < size:
        pass
    load.forget_time()
    oldest = 0
    for _ in range(steps):
        load.step()
        for _ in range(turnover):
            load.scheduler.finish(f"r{oldest}", "stop")
            load.add(own_prompt(load.names, 256), total=400 + steps)
            oldest += 1
    return load.measurement(f"{turnover} end and come per step")


def prefix(size: int, steps: int) -> Measurement:
    """Admission of requests whose first 512 tokens are cached."""
    shared = list(range(512))
    load = Load(size=size + 1, blocks=size * 3 + 100, budget=8192 + size)
    load.add([*shared, 1], total=600)
    load.step()
    for number in range(size):
        load.add([*shared, *own_prompt(number, 16)], total=600)
    load.forget_time()
    while load.scheduler.statistics().waiting:
        load.step()
    hits = load.scheduler.statistics().prefix_hit_tokens / (512 * size)
    return Measurement(
        seconds=load.seconds, entries=size, steps=load.steps, note=f"per admitted request, {hits:.0%} of prefixes hit"
    )


def storm(size: int, steps: int) -> Measurement:
    """Everybody wants four blocks and there are two for each."""
    load = Load(size=size, blocks=size * 2 + 10, budget=8 * size)
    for number in range(size):
        load.add(own_prompt(number, 20), total=MAX_MODEL_LEN if size * 2 * BLOCK_SIZE > MAX_MODEL_LEN else 10 * size)
    load.step()
    load.forget_time()
    for _ in range(steps):
        load.step()
    preemptions = load.scheduler.statistics().preemptions
    return load.measurement(f"{preemptions} preemptions")


def yardstick(size: int) -> float:
    """Seconds that this machine takes now for a plain loop over requests, per request: two reads and an append."""
    requests = [Request(f"r{number}", [1], max_total_tokens=2) for number in range(size)]
    best = float("inf")
    for _ in range(5):
        out: list[int] = []
        start = process_time()
        for request in requests:
            if request.computed_tokens < request.max_total_tokens:
                out.append(request.computed_tokens)
        best = min(best, process_time() - start)
    return best / size


LOADS: Mapping[str, Callable[[int, int], Measurement]] = MappingProxyType(
    {"decode": decode, "mixed": mixed, "prefix": prefix, "storm": storm}
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of the scheduler per request and step.")
    parser.add_argument("--sizes", default="100,1000,10000", help="numbers of running requests")
    parser.add_argument("--steps", type=int, default=64, help="timed steps of each load")
    parser.add_argument("--profile", choices=tuple(LOADS), help="profile one load at the last size instead")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.profile:
        profiler = cProfile.Profile()
        profiler.runcall(LOADS[arguments.profile], sizes[-1], arguments.steps)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)
        return
    print(f"{'load':8} {'requests':>8} {'steps':>6} {'us/request/step':>16} {'ms/step':>9} {'loops':>6}  note")
    for name, load in LOADS.items():
        for size in sizes:
            yard = yardstick(10_000) * 1e6
            result = load(size, arguments.steps)
            each = result.seconds / max(1, result.entries) * 1e6
            step = result.seconds / max(1, result.steps) * 1e3
            print(f"{name:8} {size:8d} {result.steps:6d} {each:16.2f} {step:9.3f} {each / yard:6.1f}  {result.note}")


if __name__ == "__main__":
    main()
