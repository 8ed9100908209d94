"""The kernels that the simulated device has: those that touch weights or the cache.

They compute what the definitions compute, on the device's own arrays and cache, so that their
numbers are right by construction. Everything else is served by the definitions through copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midspan.errors import MidspanError
from midspan.interface.kernel import Kernel, KernelSite, No, Support
from midspan.interface.weights import DENSE
from midspan.runtimes.reference import KERNELS
from midspan.runtimes.reference.cached_rows import CachedRows
from midspan_simulated.array_space import ArraySpace
from midspan_simulated.cache import SimulatedCache
from midspan_simulated.packed_weights import unpacked

NAME = "simulated"
WEIGHTED = ("embedding", "linear", "logits")
DEFINITIONS = {kernel.op: kernel for kernel in KERNELS}


def device_kernels(
    space: ArraySpace, *, quantizations: Collection[str], refused: Collection[str], corrupt_linear: bool
) -> tuple[Kernel, ...]:
    """The table of one opened device.

    Args:
        space: whose arrays the kernels take and return.
        quantizations: packed formats that they read.
        refused: operations that they refuse, because an option says so.
        corrupt_linear: the linear kernel shall be wrong.
    """

    def supports(site: KernelSite) -> Support:
        if site.node.op in refused:
            return No(f"the device option refuse={site.node.op} asks for it")
        return DEFINITIONS[site.node.op].supports(_readable(site, quantizations))

    def prepare(site: KernelSite) -> Callable[..., Any]:
        run = DEFINITIONS[site.node.op].prepare(_readable(site, quantizations))
        error = np.float32(1.0 if corrupt_linear and site.node.op == "linear" else 0.0)

        def on_device(*inputs: Any) -> Any:
            result = run(*(space.get(value) for value in inputs))
            return space.put(result if not error else (result + error).astype(result.dtype))

        return on_device

    def prepare_attention(site: KernelSite) -> Callable[..., Any]:
        return _attention(space, site)

    kernels = [Kernel(name=NAME, op=op, prepare=prepare, supports=supports, priority=10) for op in WEIGHTED]
    attention = Kernel(name=NAME, op="attention", prepare=prepare_attention, supports=supports, priority=10)
    return (*kernels, attention)


def _readable(site: KernelSite, quantizations: Collection[str]) -> KernelSite:
    """The site with the packed weights that the device reads as the definition wants them."""
    weights = {
        role: unpacked(tensor) if tensor.format != DENSE and tensor.format in quantizations else tensor
        for role, tensor in site.weights.items()
    }
    return replace(site, weights=weights)


class _Layer:
    """One layer's blocks under numbers of their own, as the definition of attention wants them."""

    def __init__(self, keys: NDArray[Any], values: NDArray[Any], dtype: str) -> None:
        self.keys, self.values = CachedRows.encode(keys, dtype), CachedRows.encode(values, dtype)

    def layer(self, group: str, layer: int) -> tuple[CachedRows, CachedRows]:
        return self.keys, self.values


def _attention(space: ArraySpace, site: KernelSite) -> Callable[..., Any]:
    run = DEFINITIONS["attention"].prepare(site)
    group, layer = str(site.node.attributes["group"]), int(str(site.node.attributes["layer"]))

    def on_device(*inputs: Any) -> Any:
        *arrays, cache = inputs
        if not isinstance(cache, SimulatedCache):
            raise MidspanError(f"Device '{space.device_id}' was given a cache that it did not make.")
        *leading, block_table, slots = (space.get(array) for array in arrays)
        size = cache.layout.block_size
        written = np.unique(slots // size)
        blocks = np.unique(np.concatenate((written, block_table.reshape(-1))))
        held = _Layer(*cache.layer(group, layer, blocks.tolist()), cache.layout.dtype)
        own_table = np.searchsorted(blocks, block_table).astype(np.int32)
        own_slots = (np.searchsorted(blocks, slots // size) * size + slots % size).astype(np.int32)
        result = run(*leading, own_table, own_slots, held)
        places = np.searchsorted(blocks, written)
        keys, values = held.keys[places].decode(), held.values[places].decode()
        cache.put_layer(group, layer, written.tolist(), keys, values)
        return space.put(result)

    return on_device
