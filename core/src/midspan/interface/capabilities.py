"""What a device can do. The core asks this, and never who the device is.

Every default means "no", so that a new device claims only what it has.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Claims of a device, held against it by the conformance suite.

    Attributes:
        dtypes: activation types, the preferred one first: ``"float32"``, ``"bfloat16"``, ``"float16"``.
        cache_dtypes: element types of the KV cache, the preferred one first: those of ``dtypes``, and
            ``"float8_e4m3"`` and ``"int8"``, which ``CacheLayout`` defines.
        block_sizes: tokens per block that it takes, the preferred one first.
        quantizations: packed weight formats that it takes without unpacking.
        asynchronous: ``Program.run`` returns before the step has finished.
        captures_graphs: repeats recorded steps with less launch cost.
        max_world_size: devices that can work on one model together.
        batch_invariant: a request's tokens do not depend on its neighbours, bit for bit.
        deterministic: the same batch gives the same bits again.
        shares_host_memory: its memory is the host's; taking most of it would starve other programs.
        max_logprobs: largest ``num_logprobs`` that it returns.
        max_tokens: tokens of one step; None means any number that memory allows, here and below.
        max_requests: requests of one step.
        max_context: tokens of one request.
        max_sampled_rows: rows that one step samples.
        virtual_clock: steps take no time that the host could measure; how long they take
            on the device is in ``StepResult.device_seconds``.
    """

    dtypes: tuple[str, ...] = ("float32",)
    cache_dtypes: tuple[str, ...] = ("float32",)
    block_sizes: tuple[int, ...] = (16,)
    quantizations: tuple[str, ...] = ()
    asynchronous: bool = False
    captures_graphs: bool = False
    max_world_size: int = 1
    batch_invariant: bool = False
    deterministic: bool = False
    shares_host_memory: bool = False
    max_logprobs: int = 20
    max_tokens: int | None = None
    max_requests: int | None = None
    max_context: int | None = None
    max_sampled_rows: int | None = None
    virtual_clock: bool = False
