"""What several engines are together: their limits, their sizes, their counters.

Pure functions of records; knows no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from midspan.engine.status import EngineStatistics, ModelInfo


def combined_model(models: Sequence[ModelInfo]) -> ModelInfo:
    """One description of a model on several devices: limits are the least, sizes are sums, names stand side by side."""
    first = models[0]
    if len(models) == 1:
        return first
    return msgspec.structs.replace(
        first,
        max_model_len=min(model.max_model_len for model in models),
        max_logprobs=min(model.max_logprobs for model in models),
        weights_bytes=sum(model.weights_bytes for model in models),
        cache_bytes=sum(model.cache_bytes for model in models),
        cache_tokens=sum(model.cache_tokens for model in models),
        max_num_seqs=sum(model.max_num_seqs for model in models),
        device=" + ".join(model.device for model in models),
        device_description="; ".join(model.device_description for model in models),
        device_choice=" ".join(model.device_choice for model in models),
        dtype=_together(model.dtype for model in models),
        cache_dtype=_together(model.cache_dtype for model in models),
        placement={
            op: tuple(dict.fromkeys(name for model in models for name in model.placement.get(op, ())))
            for op in {op: None for model in models for op in model.placement}
        },
        kernel_fallbacks=tuple(dict.fromkeys(name for model in models for name in model.kernel_fallbacks)),
    )


def combined_statistics(readings: Sequence[EngineStatistics]) -> EngineStatistics:
    """Counters and gauges of several engines: sums, but for shares and durations, of which the largest counts."""
    finished: Counter[str] = Counter()
    for reading in readings:
        finished.update(reading.finished)
    largest = {"cache_usage": 0.0, "step_seconds": 0.0, "step_device_seconds": None}
    values: dict[str, Any] = {}
    for name in EngineStatistics.__struct_fields__:
        if name == "finished":
            continue
        found = [value for value in (getattr(reading, name) for reading in readings) if value is not None]
        values[name] = max(found, default=largest[name]) if name in largest else sum(found)
    return EngineStatistics(**values, finished=dict(finished))


def _together(names: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(names))
