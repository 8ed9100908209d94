"""From settings to a model that is ready to run.

Chooses a device, builds the graph, compiles it, sizes
and allocates the cache, and runs a first step. Knows no request and asks the
device what it can do, never who it is.

Each phase is reported as it begins, so that a person who waits knows for what.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from midspan.devices.discovery import DeviceCatalogue, architectures, discover
from midspan.devices.selection import SelectedDevice, select_device
from midspan.engine.cache_planning import CacheDemand, CachePlan, cache_budget, plan_cache, readable_bytes
from midspan.engine.status import ModelInfo, Report, StartupPhase, ignore_phase
from midspan.engine.warm_up import warm_up
from midspan.errors import SettingsError
from midspan.graph.passes import apply_passes
from midspan.interface.cache import Cache, CacheLayout
from midspan.interface.capabilities import Capabilities
from midspan.interface.device import Bounds, Device
from midspan.interface.graph import Graph
from midspan.interface.program import Program
from midspan.models.catalogue import ArchitectureBuilder, build_graph
from midspan.settings import EngineSettings
from midspan.weights.checkpoint import Checkpoint, open_checkpoint
from midspan.weights.store import CheckpointWeights, LoadProgress

SCORED_ROWS = 256
"""Rows of logits that a step may hold beside one for each sequence: prompt scoring needs
many, and each costs vocabulary size times four bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model on its device.

    Attributes:
        info: for people and for clients.
        graph: after all passes.
        device: opened.
        program: compiled.
        cache: allocated.
        bounds: what the program was compiled for.
    """

    info: ModelInfo
    graph: Graph
    device: Device
    program: Program
    cache: Cache
    bounds: Bounds

    def close(self) -> None:
        """Release the cache, the program and the device."""
        self.cache.close()
        self.program.close()
        self.device.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """What was asked for, and where it was found."""

    settings: EngineSettings
    path: Path
    selected: SelectedDevice


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedDevice:
    """A device that waits for its model.

    Attributes:
        selected: which it is, and why it was taken.
        device: opened.
        architectures: builders that installed packages bring.
    """

    selected: SelectedDevice
    device: Device
    architectures: Mapping[str, ArchitectureBuilder]


def open_device(
    settings: EngineSettings, *, catalogue: DeviceCatalogue | None = None, report: Report = ignore_phase
) -> OpenedDevice:
    """Choose and open the device that the settings ask for.

    Args:
        settings: ``device`` and its options.
        catalogue: the devices to choose from; None: those installed here.
        report: hears which was taken.

    Raises:
        DeviceNotFound, PluginError: the device cannot be had.
        SettingsError: an option that it does not take.
    """
    found = discover() if catalogue is None else catalogue
    selected = select_device(found, settings.device)
    report(StartupPhase(name="device", detail=selected.explanation))
    device = selected.plugin.open(selected.info, settings.device_options)
    return OpenedDevice(selected=selected, device=device, architectures=architectures(found.registry))


def load_model(
    settings: EngineSettings,
    path: Path,
    *,
    catalogue: DeviceCatalogue | None = None,
    opened: OpenedDevice | None = None,
    report: Report = ignore_phase,
) -> LoadedModel:
    """Load a model onto a device.

    Args:
        settings: what to load, and how.
        path: its files, from ``locate_model``.
        catalogue: the devices to choose from; None: those installed here.
        opened: the device, closed when the loading fails; None: it is chosen and opened once the files were found good.
        report: gets each phase as it begins.

    Raises:
        CheckpointError, UnsupportedModel: the files are damaged or not understood.
        DeviceNotFound, PluginError: the device cannot be had.
        SettingsError: a setting that this device or model cannot serve.
        OutOfDeviceMemory, CacheTooSmall: it does not fit.
    """
    try:
        report(StartupPhase(name="checkpoint", detail=str(path)))
        checkpoint = open_checkpoint(path)
        if opened is None:
            opened = open_device(settings, catalogue=catalogue, report=report)
        device = opened.device
        graph = build_graph(checkpoint.config, architectures=opened.architectures)
        graph = apply_passes(graph)
        report(StartupPhase(name="graph", detail=f"{graph.architecture}, {len(graph.nodes)} nodes"))
        bounds = choose_bounds(settings, device.capabilities, checkpoint, graph)
        program = _compile(device, graph, checkpoint, bounds, report)
        asked = _Asked(settings=settings, path=path, selected=opened.selected)
        return _finish(asked, device, graph, program, bounds, report)
    except BaseException:
        if opened is not None:
            opened.device.close()
        raise


def choose_bounds(settings: EngineSettings, capabilities: Capabilities, checkpoint: Checkpoint, graph: Graph) -> Bounds:
    """The limits to compile for.

    Raises:
        SettingsError: a type or block size that the device does not take, or a context
            longer than the model's.
    """
    if settings.max_model_len is not None and settings.max_model_len > graph.max_position:
        raise SettingsError(
            f"max_model_len is {settings.max_model_len}, but the model was made for {graph.max_position} positions.",
            remedy=f"Set max_model_len to {graph.max_position} or less.",
        )
    dtype = choose_dtype(settings.dtype, capabilities, checkpoint.dtype)
    block_size = settings.block_size or capabilities.block_sizes[0]
    _require("block_size", block_size, capabilities.block_sizes)
    cache_dtype = settings.kv_cache_dtype
    if cache_dtype == "auto":
        cache_dtype = dtype if dtype in capabilities.cache_dtypes else capabilities.cache_dtypes[0]
    _require("kv_cache_dtype", cache_dtype, capabilities.cache_dtypes)
    return Bounds(
        max_tokens=settings.max_num_batched_tokens,
        max_requests=min(settings.max_num_seqs, settings.max_num_batched_tokens),
        max_context=settings.max_model_len or graph.max_position,
        max_sampled_rows=min(max(settings.max_num_seqs, SCORED_ROWS), settings.max_num_batched_tokens),
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        kernels=dict(settings.kernels),
        strict=settings.strict,
    )


def choose_dtype(asked: str, capabilities: Capabilities, published: str | None) -> str:
    """The activation type.

    Args:
        asked: a type's name, or ``auto``.
        capabilities: the types that the device claims, the preferred one first.
        published: the type of the checkpoint, None for a quantized one.

    Raises:
        SettingsError: the device does not claim the asked type.
    """
    if asked != "auto":
        _require("dtype", asked, capabilities.dtypes)
        return asked
    return published if published in capabilities.dtypes else capabilities.dtypes[0]


def _require(name: str, value: object, claimed: tuple[object, ...]) -> None:
    if value not in claimed:
        raise SettingsError(
            f"The device does not take {name}={value}.",
            remedy=f"It takes {', '.join(str(item) for item in claimed)}.",
        )


def _compile(device: Device, graph: Graph, checkpoint: Checkpoint, bounds: Bounds, report: Report) -> Program:
    def progress(step: LoadProgress) -> None:
        report(StartupPhase(name="weights", detail=step.tensor, done=step.bytes_done, total=step.bytes_total))

    report(StartupPhase(name="compile", detail=f"{readable_bytes(checkpoint.nbytes)} of weights as {bounds.dtype}"))
    weights = CheckpointWeights(
        checkpoint, quantizations=device.capabilities.quantizations, dtype=bounds.dtype, report=progress
    )
    return device.compile(graph, weights, bounds)


def _finish(
    asked: _Asked, device: Device, graph: Graph, program: Program, bounds: Bounds, report: Report
) -> LoadedModel:
    plan = _plan(asked.settings, device, graph, bounds)
    if plan.lowered_from is not None:
        report(
            StartupPhase(
                name="cache",
                detail=f"max_model_len is lowered from {plan.lowered_from} to {plan.max_model_len}, which is what the "
                "KV cache can hold; give it more memory to raise it",
            )
        )
    report(StartupPhase(name="cache", detail=f"{readable_bytes(plan.bytes)} of KV cache"))
    layout = CacheLayout(groups=graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype)
    cache = device.allocate_cache(layout, plan.blocks)
    report(StartupPhase(name="warm-up"))
    warm_up(program, cache, bounds, graph.vocab_size)
    info = _describe(asked, graph, program, bounds, plan, device.capabilities.max_logprobs)
    return LoadedModel(info=info, graph=graph, device=device, program=program, cache=cache, bounds=bounds)


def _plan(settings: EngineSettings, device: Device, graph: Graph, bounds: Bounds) -> CachePlan:
    demand = CacheDemand(
        groups=graph.cache,
        block_size=bounds.block_size,
        dtype=bounds.cache_dtype,
        max_num_seqs=bounds.max_requests,
        max_num_batched_tokens=bounds.max_tokens,
    )
    budget = cache_budget(settings, device.memory(), shares_host_memory=device.capabilities.shares_host_memory)
    return plan_cache(demand, budget=budget, asked=settings.max_model_len, model_limit=graph.max_position)


def _describe(
    asked: _Asked, graph: Graph, program: Program, bounds: Bounds, plan: CachePlan, max_logprobs: int
) -> ModelInfo:
    kernels: dict[str, dict[str, None]] = {}
    for node in program.placement.nodes:
        kernels.setdefault(node.op, {})[node.kernel] = None
    return ModelInfo(
        name=asked.settings.model,
        path=str(asked.path),
        architecture=graph.architecture,
        max_model_len=plan.max_model_len,
        vocab_size=graph.vocab_size,
        dtype=bounds.dtype,
        cache_dtype=bounds.cache_dtype,
        device=asked.selected.info.id,
        device_description=asked.selected.info.description,
        device_choice=asked.selected.explanation,
        weights_bytes=program.memory_bytes(),
        cache_bytes=plan.bytes,
        cache_tokens=(max(plan.blocks, default=1) - 1) * bounds.block_size,
        block_size=bounds.block_size,
        max_num_seqs=bounds.max_requests,
        max_logprobs=max_logprobs,
        created=int(time.time()),
        placement={op: tuple(names) for op, names in kernels.items()},
        kernel_fallbacks=tuple(node.node for node in program.placement.nodes if node.fallback),
    )
