"""The device: claims, memory, and the way from a graph to a program."""

from __future__ import annotations

from midspan.errors import SettingsError
from midspan.interface import Bounds, CacheLayout, Capabilities, DeviceInfo, Graph, MemoryReport, WeightSource
from midspan_lattice.arena import Arena
from midspan_lattice.cache import LatticeCache, page_bytes
from midspan_lattice.program import KERNEL, LatticeProgram
from midspan_lattice.tracing import split

CAPABILITIES = Capabilities(
    dtypes=("float32", "bfloat16"),
    cache_dtypes=("float32", "bfloat16"),
    block_sizes=(24, 6),
    deterministic=True,
    max_logprobs=12,
    max_tokens=160,
    max_requests=20,
    max_context=1500,
    max_sampled_rows=40,
)
"""Odd on purpose, to show that the core takes them as they are. Not batch invariant: how a product is summed
depends on the bucket."""


class LatticeDevice:
    """See ``midspan.interface.Device``.

    Args:
        info: from the probe.
        memory_bytes: size of the arena.
    """

    def __init__(self, info: DeviceInfo, memory_bytes: int) -> None:
        self.info = info
        self.capabilities = CAPABILITIES
        self._arena = Arena(memory_bytes)
        self._open: list[LatticeProgram | LatticeCache] = []

    def compile(self, graph: Graph, weights: WeightSource, bounds: Bounds) -> LatticeProgram:
        """Check the whole graph, bring the weights into the arena, and plan the largest step."""
        self._require_claimed(bounds.dtype, bounds.cache_dtype, bounds.block_size)
        claims = self.capabilities
        for name, asked, most in (
            ("max_tokens", bounds.max_tokens, claims.max_tokens),
            ("max_requests", bounds.max_requests, claims.max_requests),
            ("max_context", bounds.max_context, claims.max_context),
            ("max_sampled_rows", bounds.max_sampled_rows, claims.max_sampled_rows),
        ):
            if most is not None and asked > most:
                raise SettingsError(
                    f"{name} is {asked}, '{self.info.id}' takes {most}.", remedy=f"Take {most} or less."
                )
        for op, kernel in bounds.kernels.items():
            if kernel != KERNEL:
                raise SettingsError(f"There is no kernel '{kernel}' for '{op}' here.", remedy=f"Take '{KERNEL}'.")
        parts = split(graph, self.info.id)
        content = {name: weights.load(weight) for name, weight in graph.weights.items()}
        program = LatticeProgram(graph, parts, content, bounds=bounds, arena=self._arena, device_id=self.info.id)
        self._open.append(program)
        return program

    def allocate_cache(self, layout: CacheLayout, blocks: tuple[int, ...]) -> LatticeCache:
        """Take pages for each group from the arena."""
        self._require_claimed(self.capabilities.dtypes[0], layout.dtype, layout.block_size)
        cache = LatticeCache(layout, blocks, self._arena)
        self._open.append(cache)
        return cache

    def block_bytes(self, layout: CacheLayout) -> tuple[int, ...]:
        """Bytes of a block of each group: a page, in whole tiles, for each layer."""
        return tuple(group.layers * page_bytes(group, layout) for group in layout.groups)

    def memory(self) -> MemoryReport:
        """How full the arena is."""
        used = self._arena.used_bytes()
        return MemoryReport(total_bytes=self._arena.nbytes, free_bytes=self._arena.nbytes - used, used_bytes=used)

    def synchronize(self) -> None:
        """Every step has finished when it returns."""

    def close(self) -> None:
        """Close programs and caches."""
        for opened in self._open:
            opened.close()
        self._open = []

    def _require_claimed(self, dtype: str, cache_dtype: str, block_size: int) -> None:
        claims = self.capabilities
        for asked, claimed in (
            (dtype, claims.dtypes),
            (cache_dtype, claims.cache_dtypes),
            (block_size, claims.block_sizes),
        ):
            if asked not in claimed:
                raise SettingsError(
                    f"The device '{self.info.id}' does not take {asked}.",
                    remedy=f"It takes {', '.join(map(str, claimed))}.",
                )
