"""From settings to a model that is ready to run.

Chooses a device, builds the graph, compiles it, sizes
and allocates the cache, and runs a first step. Knows no request and asks the
device what it can do, never who it is.

Each phase is reported as it begins, so that a person who waits knows for what.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from midspan.devices.contract import check_block_bytes, check_cache, check_memory, check_program, plugin_at_fault
from midspan.devices.discovery import DeviceCatalogue, architectures, discover, quantizations
from midspan.devices.selection import SelectedDevice, open_selected, select_device
from midspan.engine.bounds import choose_bounds
from midspan.engine.cache_planning import CacheDemand, CachePlan, cache_budget, plan_cache, readable_bytes
from midspan.engine.status import ModelInfo, Report, StartupPhase, ignore_phase
from midspan.engine.warm_up import warm_up
from midspan.engine.weight_loading import ModelWeights
from midspan.graph.passes import apply_passes
from midspan.interface.cache import Cache, CacheLayout
from midspan.interface.device import Bounds, Device
from midspan.interface.graph import Graph
from midspan.interface.program import Program
from midspan.interface.weights import QuantizationReader
from midspan.models.catalogue import ArchitectureBuilder, build_graph
from midspan.settings import EngineSettings
from midspan.weights.checkpoint import Checkpoint, open_checkpoint
from midspan.weights.dummy_weights import with_dummy_weights
from midspan.weights.published.catalogue import read_quantized
from midspan.weights.store import LoadProgress


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

    def plugin_works(self, doing: str) -> AbstractContextManager[None]:
        """A context in which the device's plugin is at fault for what Midspan did not raise itself."""
        return plugin_at_fault(self.selected.plugin, self.selected.distribution, doing)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedDevice:
    """A device that waits for its model.

    Attributes:
        selected: which it is, and why it was taken.
        device: opened.
        architectures: builders that installed packages bring.
        quantizations: readers of published quantizations that installed packages bring.
    """

    selected: SelectedDevice
    device: Device
    architectures: Mapping[str, ArchitectureBuilder]
    quantizations: Mapping[str, QuantizationReader] = field(default_factory=dict)


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
    device = open_selected(selected, settings.device_options)
    return OpenedDevice(
        selected=selected,
        device=device,
        architectures=architectures(found.registry),
        quantizations=quantizations(found.registry),
    )


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
        made_up = "" if settings.reads_weights else ", with random numbers for weights"
        report(StartupPhase(name="checkpoint", detail=f"{path}{made_up}"))
        checkpoint = open_checkpoint(path, weights=settings.reads_weights)
        if opened is None:
            opened = open_device(settings, catalogue=catalogue, report=report)
        device = opened.device
        graph = build_graph(checkpoint.config, architectures=opened.architectures)
        if settings.reads_weights:
            checkpoint = read_quantized(checkpoint, readers=opened.quantizations)
        else:
            checkpoint = with_dummy_weights(checkpoint, graph)
        graph = apply_passes(graph)
        report(StartupPhase(name="graph", detail=f"{graph.architecture}, {len(graph.nodes)} nodes"))
        chosen = choose_bounds(settings, device.capabilities, checkpoint.dtype, graph, device=opened.selected.info.id)
        if chosen.cuts:
            report(StartupPhase(name="limits", detail=f"{', '.join(chosen.cuts)}, which is what the device takes"))
        asked = _Asked(settings=settings, path=path, selected=opened.selected)
        program, quantization = _compile(asked, device, graph, checkpoint, chosen.bounds, report)
        return _finish(asked, device, graph, program, chosen.bounds, quantization, report)
    except BaseException:
        if opened is not None:
            opened.device.close()
        raise


def _compile(
    asked: _Asked, device: Device, graph: Graph, checkpoint: Checkpoint, bounds: Bounds, report: Report
) -> tuple[Program, str]:
    """The program, and in which packed formats it has its weights."""

    def progress(step: LoadProgress) -> None:
        report(StartupPhase(name="weights", detail=step.tensor, done=step.bytes_done, total=step.bytes_total))

    weights = ModelWeights(
        checkpoint,
        graph,
        quantization=asked.settings.quantization,
        capabilities=device.capabilities,
        dtype=bounds.dtype,
        device=asked.selected.info.id,
        report=progress,
    )
    report(StartupPhase(name="compile", detail=f"{readable_bytes(checkpoint.nbytes)} of weights as {bounds.dtype}"))
    with asked.plugin_works("the graph was compiled"):
        program = device.compile(graph, weights.source, bounds)
        check_program(program, asked.selected.plugin)
    weights.release()
    summary = weights.summary()
    if summary:
        report(StartupPhase(name="quantization", detail=summary))
    return program, summary


def _finish(
    asked: _Asked, device: Device, graph: Graph, program: Program, bounds: Bounds, quantization: str, report: Report
) -> LoadedModel:
    layout = CacheLayout(groups=graph.cache, block_size=bounds.block_size, dtype=bounds.cache_dtype)
    plan = _plan(asked, device, layout, bounds)
    if plan.lowered_from is not None:
        report(
            StartupPhase(
                name="cache",
                detail=f"max_model_len is lowered from {plan.lowered_from} to {plan.max_model_len}, which is what the "
                "KV cache can hold; give it more memory to raise it",
            )
        )
    report(StartupPhase(name="cache", detail=f"{readable_bytes(plan.bytes)} of KV cache as {layout.dtype}"))
    with asked.plugin_works("the cache was allocated"):
        cache = device.allocate_cache(layout, plan.blocks)
        check_cache(cache, asked.selected.plugin, layout, plan.blocks)
    report(StartupPhase(name="warm-up"))
    with asked.plugin_works("the first step ran"):
        warm_up(program, cache, bounds, graph.vocab_size)
    info = _describe(asked, graph, program, bounds, plan, device.capabilities.max_logprobs, quantization)
    return LoadedModel(info=info, graph=graph, device=device, program=program, cache=cache, bounds=bounds)


def _plan(asked: _Asked, device: Device, layout: CacheLayout, bounds: Bounds) -> CachePlan:
    plugin, settings = asked.selected.plugin, asked.settings
    with asked.plugin_works("the cache was planned"):
        sizes = check_block_bytes(device.block_bytes(layout), plugin, layout)
        memory = check_memory(device.memory(), plugin)
    demand = CacheDemand(
        groups=layout.groups,
        block_size=bounds.block_size,
        block_bytes=sizes,
        max_num_seqs=bounds.max_requests,
        max_num_batched_tokens=bounds.max_tokens,
    )
    budget = cache_budget(settings, memory, shares_host_memory=device.capabilities.shares_host_memory)
    return plan_cache(demand, budget=budget, asked=settings.max_model_len, model_limit=bounds.max_context)


def _describe(
    asked: _Asked,
    graph: Graph,
    program: Program,
    bounds: Bounds,
    plan: CachePlan,
    max_logprobs: int,
    quantization: str,
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
        quantization=quantization,
    )
