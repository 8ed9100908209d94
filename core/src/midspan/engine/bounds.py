"""The limits that a program is compiled for: what was asked for, the model and the device agree on.

Arithmetic over settings and claims; knows no device by name and opens none. What
somebody asked for and the device does not take is an error; what nobody asked for is
cut to what the device takes, and the cut is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midspan.errors import SettingsError
from midspan.interface.capabilities import Capabilities
from midspan.interface.device import Bounds
from midspan.interface.graph import Graph
from midspan.settings import EngineSettings

MAX_NUM_SEQS = 256
"""Requests in one step, where nobody and no device says otherwise."""
MAX_NUM_BATCHED_TOKENS = 2048
"""Tokens in one step, likewise."""
CACHE_TYPE_NAMES: Mapping[str, str] = {"fp8": "float8_e4m3", "fp8_e4m3": "float8_e4m3"}
"""Other names of cache types that ``kv_cache_dtype`` takes."""
SCORED_ROWS = 256
"""Rows of logits that a step may hold beside one for each sequence: prompt scoring needs
many, and each costs vocabulary size times four bytes."""


@dataclass(frozen=True, kw_only=True)
class ChosenBounds:
    """The limits, and how they came about.

    Attributes:
        bounds: to compile for.
        cuts: for people, one text for each limit that the device lowered.
    """

    bounds: Bounds
    cuts: tuple[str, ...]


def choose_bounds(
    settings: EngineSettings, capabilities: Capabilities, published_dtype: str | None, graph: Graph, *, device: str
) -> ChosenBounds:
    """The limits to compile for.

    Args:
        settings: what was asked for.
        capabilities: what the device takes.
        published_dtype: the checkpoint's type, None for a quantized one.
        graph: of the model.
        device: its id, for messages.

    Raises:
        SettingsError: a type, block size or limit that the device does not take, or a context
            longer than the model's.
    """
    if settings.max_model_len is not None and settings.max_model_len > graph.max_position:
        raise SettingsError(
            f"max_model_len is {settings.max_model_len}, but the model was made for {graph.max_position} positions.",
            remedy=f"Set max_model_len to {graph.max_position} or less.",
        )
    dtype = choose_dtype(settings.dtype, capabilities, published_dtype, device=device)
    block_size = settings.block_size or capabilities.block_sizes[0]
    _require("block_size", block_size, capabilities.block_sizes, device)
    cache_dtype = CACHE_TYPE_NAMES.get(settings.kv_cache_dtype, settings.kv_cache_dtype)
    if cache_dtype == "auto":
        cache_dtype = dtype if dtype in capabilities.cache_dtypes else capabilities.cache_dtypes[0]
    _require("kv_cache_dtype", cache_dtype, capabilities.cache_dtypes, device)
    cuts: list[str] = []
    tokens = _limit(
        "max_num_batched_tokens", settings.max_num_batched_tokens, MAX_NUM_BATCHED_TOKENS, capabilities.max_tokens, cuts
    )
    requests = _limit("max_num_seqs", settings.max_num_seqs, MAX_NUM_SEQS, capabilities.max_requests, cuts)
    context = _limit("max_model_len", settings.max_model_len, graph.max_position, capabilities.max_context, cuts)
    rows = min(max(requests, SCORED_ROWS), tokens)
    bounds = Bounds(
        max_tokens=tokens,
        max_requests=min(requests, tokens),
        max_context=context,
        max_sampled_rows=rows if capabilities.max_sampled_rows is None else min(rows, capabilities.max_sampled_rows),
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        kernels=dict(settings.kernels),
        strict=settings.strict,
    )
    return ChosenBounds(bounds=bounds, cuts=tuple(cuts))


def choose_dtype(asked: str, capabilities: Capabilities, published: str | None, *, device: str) -> str:
    """The activation type.

    Args:
        asked: a type's name, or ``auto``.
        capabilities: the types that the device claims, the preferred one first.
        published: the type of the checkpoint, None for a quantized one.
        device: its id, for messages.

    Raises:
        SettingsError: the device does not claim the asked type.
    """
    if asked != "auto":
        _require("dtype", asked, capabilities.dtypes, device)
        return asked
    return published if published in capabilities.dtypes else capabilities.dtypes[0]


def _limit(name: str, asked: int | None, default: int, most: int | None, cuts: list[str]) -> int:
    """What was asked for, or the default as far as the device takes it."""
    if asked is not None:
        if most is not None and asked > most:
            raise SettingsError(
                f"{name} is {asked}, but the device takes {most} at most.",
                remedy=f"Set {name} to {most} or less, or leave it out.",
            )
        return asked
    if most is None or default <= most:
        return default
    cuts.append(f"{name} is {most} instead of {default}")
    return most


def _require(name: str, value: object, claimed: tuple[object, ...], device: str) -> None:
    if value not in claimed:
        raise SettingsError(
            f"The device {device} does not take {name}={value}.",
            remedy=f"It takes {', '.join(str(item) for item in claimed)}.",
        )
