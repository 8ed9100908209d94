"""What an engine says about itself: its model, its start-up, its counters.

Plain records that also travel between processes as they are. Knows no device and
no transport.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class StartupPhase(msgspec.Struct, frozen=True, kw_only=True, tag="phase"):
    """One moment of start-up.

    Attributes:
        name: what is going on: ``"download"``, ``"unpack"``, ``"checkpoint"``, ``"device"``,
            ``"graph"``, ``"limits"``, ``"compile"``, ``"weights"``, ``"quantization"``, ``"cache"``, ``"warm-up"``,
            ``"ready"``.
        detail: for people.
        done: units finished, or None where progress has no number.
        total: units in all, or None.
    """

    name: str
    detail: str = ""
    done: int | None = None
    total: int | None = None


Report = Callable[[StartupPhase], None]
"""Who is told of a start's phases."""


def ignore_phase(phase: StartupPhase) -> None:
    """A report to nobody."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves, and on what.

    Attributes:
        name: as asked for.
        path: folder or file that it was loaded from.
        architecture: the published class name.
        max_model_len: tokens of one request, prompt and output together.
        vocab_size: token ids are below it.
        dtype: the activation type.
        cache_dtype: element type of the KV cache.
        device: the device's id.
        device_description: product and size, for people.
        device_choice: why this device was taken.
        weights_bytes: bytes that the program occupies.
        cache_bytes: bytes that the KV cache may come to occupy.
        cache_tokens: tokens that the KV cache holds at once.
        block_size: tokens per cache block.
        max_num_seqs: sequences in one step.
        max_logprobs: top logprobs that the device returns at most.
        created: seconds since 1970 when it was loaded.
        placement: per operation, the names of the kernels that serve it.
        kernel_fallbacks: names of nodes served by a portable fallback.
        quantization: in which packed formats the device has matrices, and how they came to be; "" where all are dense.
    """

    name: str
    path: str
    architecture: str
    max_model_len: int
    vocab_size: int
    dtype: str
    cache_dtype: str
    device: str
    device_description: str
    device_choice: str
    weights_bytes: int
    cache_bytes: int
    cache_tokens: int
    block_size: int
    max_num_seqs: int
    max_logprobs: int
    created: int
    placement: dict[str, tuple[str, ...]] = {}
    kernel_fallbacks: tuple[str, ...] = ()
    quantization: str = ""


class EngineStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and gauges of an engine; totals count since its process started.

    Attributes:
        received: requests that came, new or moved, refused ones among them.
        running: sequences that hold blocks.
        waiting: sequences that wait for their first or next turn.
        blocks_in_use: cache blocks that sequences hold, over all groups.
        blocks_total: cache blocks that can be held, over all groups.
        cache_usage: the share of the fullest group, 0 to 1.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: prompt tokens found there.
        preemptions: sequences that lost their blocks for others.
        prompt_tokens: prompt tokens computed or found.
        generation_tokens: tokens generated.
        steps: steps executed.
        finished: sequences that ended, by finish reason.
        step_tokens: tokens of the last step.
        step_seconds: duration of the last step.
        step_device_seconds: the device's own time of the last step; None where it does not tell.
        restarts: times that the engine process was replaced.
    """

    received: int = 0
    running: int = 0
    waiting: int = 0
    blocks_in_use: int = 0
    blocks_total: int = 0
    cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = {}
    step_tokens: int = 0
    step_seconds: float = 0.0
    step_device_seconds: float | None = None
    restarts: int = 0
