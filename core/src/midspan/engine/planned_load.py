"""Which requests a load test sends, and when: numbers out of one seed.

Lengths, prompts and moments of arrival come from streams of their own, so that changing
one leaves the others as they are. Knows no engine, no server and no clock.

Invariants: the same arguments give the same numbers on every machine and Python; a
higher rate only brings the same arrivals closer together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from midspan.errors import SettingsError

WARM_UP_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """One request.

    Attributes:
        prompt_ids: its prompt.
        output_tokens: how many tokens it generates, exactly.
    """

    prompt_ids: Sequence[int]
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """What the requests of a load look like.

    Attributes:
        count: requests.
        input_tokens: of each prompt, in the mean.
        output_tokens: of each answer, in the mean.
        range_ratio: lengths are uniform between (1 - ratio) and (1 + ratio) times the mean; 0: all alike.
        seed: of lengths and arrivals.
    """

    count: int
    input_tokens: int
    output_tokens: int
    range_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise SettingsError(f"A load's {name} must be at least 1, not {getattr(self, name)}.")
        if not 0.0 <= self.range_ratio < 1.0:
            raise SettingsError(
                f"The range ratio of a load's lengths must be at least 0 and below 1, not {self.range_ratio:g}.",
                remedy="0.5 makes lengths between half and one and a half of the mean.",
            )

    def warm_up(self, count: int) -> LoadShape:
        """So many requests of this kind that end soon, to run before what is measured."""
        tokens = min(WARM_UP_TOKENS, self.output_tokens)
        return replace(self, count=count, output_tokens=tokens, range_ratio=0.0)

    def longest_request(self) -> int:
        """Tokens of prompt and answer that a request of this load has at most."""
        return sum(_range(mean, self.range_ratio)[1] for mean in (self.input_tokens, self.output_tokens))


def plan_requests(shape: LoadShape, vocabulary: int, *, prompt_seed: int | None) -> list[PlannedRequest]:
    """The requests, in the order of their arrival.

    Args:
        shape: how many, and how long.
        vocabulary: prompts are random token ids below it.
        prompt_seed: the same one gives the same prompts; None: new ones, which no prefix cache holds.
    """
    lengths = random.Random(f"lengths {shape.seed}")
    source = random.Random() if prompt_seed is None else random.Random(f"prompts {prompt_seed}")
    planned = []
    for _ in range(shape.count):
        inputs = lengths.randint(*_range(shape.input_tokens, shape.range_ratio))
        outputs = lengths.randint(*_range(shape.output_tokens, shape.range_ratio))
        planned.append(PlannedRequest(prompt_ids=source.choices(range(vocabulary), k=inputs), output_tokens=outputs))
    return planned


def plan_arrivals(shape: LoadShape, rate: float) -> list[float]:
    """When the requests arrive: a Poisson process in which the last of n arrives at n / rate.

    Fixing the last one makes the offered rate exactly what was asked; the others are as
    those of any Poisson process that has so many arrivals until then.

    Args:
        shape: how many, and the seed.
        rate: requests a second; infinity: all at once.

    Returns:
        Seconds since the start, rising.

    Raises:
        SettingsError: the rate is not above 0.
    """
    check_rate(rate)
    if math.isinf(rate):
        return [0.0] * shape.count
    source = random.Random(f"arrivals {shape.seed}")
    moments, moment = [], 0.0
    for _ in range(shape.count):
        moment -= math.log(1.0 - source.random())
        moments.append(moment)
    return [moment * shape.count / moments[-1] / rate for moment in moments]


def check_rate(rate: float) -> None:
    """Refuse a rate that cannot be.

    Raises:
        SettingsError: it is not above 0.
    """
    if not rate > 0:
        raise SettingsError(
            f"The request rate must be above 0, not {rate:g}.", remedy="Take a number of requests a second, or inf."
        )


def _range(mean: int, ratio: float) -> tuple[int, int]:
    return max(1, math.floor(mean * (1 - ratio))), math.floor(mean * (1 + ratio))
