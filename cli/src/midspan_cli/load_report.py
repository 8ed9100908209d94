"""What a load test measured, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MILLISECONDS = 1000.0


@dataclass(kw_only=True)
class RequestTiming:
    """One request of a load test; moments in seconds of one monotonic clock.

    Attributes:
        start: when it was sent.
        tokens: generated tokens.
        moments: when each piece came.
        error: why it failed, or None.
    """

    start: float
    tokens: int = 0
    moments: list[float] = field(default_factory=list)
    error: str | None = None

    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.moments[0] - self.start if self.moments else None

    def per_token(self) -> float | None:
        """Mean seconds for a token after the first."""
        if len(self.moments) < 2 or self.tokens < 2:
            return None
        return (self.moments[-1] - self.moments[0]) / (self.tokens - 1)


def summarize(timings: Sequence[RequestTiming], *, input_tokens: int, seconds: float) -> dict[str, Any]:
    """The figures of a load test.

    Args:
        timings: of all requests.
        input_tokens: tokens of all prompts together.
        seconds: from the first start to the last end.
    """
    good = [timing for timing in timings if timing.error is None]
    output_tokens = sum(timing.tokens for timing in good)
    errors = sorted({timing.error for timing in timings if timing.error is not None})
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "errors": errors[:5],
        "seconds": seconds,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (input_tokens + output_tokens) / seconds,
        "ttft_ms": _spread([timing.first() for timing in good]),
        "tpot_ms": _spread([timing.per_token() for timing in good]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = sorted(value * MILLISECONDS for value in values if value is not None)
    if not known:
        return None
    return {
        "mean": sum(known) / len(known),
        "p50": _quantile(known, 0.5),
        "p99": _quantile(known, 0.99),
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
