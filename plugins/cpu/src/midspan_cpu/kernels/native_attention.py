"""Paged attention by the native library, on the cache that this device allocates."""

from __future__ import annotations

from collections.abc import Callable

import torch

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.runtimes.torch.cache import TorchCache
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, numbers, optional_integer, optional_number, text
from midspan_cpu.native_library import ELEMENT_TYPES, AttentionConfig, NativeLibrary

PRIORITY = 20

BLOCK_MULTIPLE = 16


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """The kernel named ``native`` for ``attention``."""

    def prepare(site: KernelSite) -> Callable[..., torch.Tensor]:
        return _attention(site, preparation, library)

    return (Kernel(name="native", op="attention", prepare=prepare, supports=_supports, priority=PRIORITY),)


def _supports(site: KernelSite) -> Support:
    if site.block_size % BLOCK_MULTIPLE:
        return No(f"takes blocks of a multiple of {BLOCK_MULTIPLE} tokens, not {site.block_size}")
    return Yes()


class _LayerConfig:
    """The configuration of one attention layer, filled in with the addresses of the cache that it is run on."""

    def __init__(self, site: KernelSite, preparation: Preparation) -> None:
        self._group, self._layer = text(site, "group"), integer(site, "layer")
        self._slopes = None
        if site.node.attributes["alibi_slopes"] is not None:
            self._slopes = torch.tensor(numbers(site, "alibi_slopes"), dtype=torch.float32)
        sinks = site.weights.get("sinks")
        self._sinks = None if sinks is None else preparation.vector(sinks, torch_type(site.dtype))
        self._cache: object = None
        self._config = AttentionConfig(
            block_size=site.block_size,
            heads=integer(site, "heads"),
            kv_heads=integer(site, "kv_heads"),
            key_size=integer(site, "key_size"),
            value_size=integer(site, "value_size"),
            window=optional_integer(site, "window") or 0,
            alibi_slopes=None if self._slopes is None else self._slopes.data_ptr(),
            sinks=None if self._sinks is None else self._sinks.data_ptr(),
            scale=number(site, "scale"),
            soft_cap=optional_number(site, "soft_cap") or 0.0,
            type=ELEMENT_TYPES[site.dtype],
            cache_type=ELEMENT_TYPES[site.cache_dtype],
        )

    def on(self, cache: TorchCache) -> AttentionConfig:
        """The configuration for a cache."""
        if cache.identity is not self._cache:
            keys, values = cache.layer(self._group, self._layer)
            self._config.key_cache, self._config.value_cache = keys.data_ptr(), values.data_ptr()
            self._config.blocks = keys.shape[0]
            self._cache = cache.identity
        return self._config


def _attention(site: KernelSite, preparation: Preparation, library: NativeLibrary) -> Callable[..., torch.Tensor]:
    config_on = _LayerConfig(site, preparation).on
    columns = integer(site, "heads") * integer(site, "value_size")
    dtype, empty = torch_type(site.dtype), torch.empty
    write, attend = library.write_cache, library.attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        context_lengths: torch.Tensor,
        block_table: torch.Tensor,
        slots: torch.Tensor,
        cache: TorchCache,
    ) -> torch.Tensor:
        config, tokens = config_on(cache), query.shape[0]
        stride, value_stride = key.stride(0), value.stride(0)
        write(config, key.data_ptr(), stride, value.data_ptr(), value_stride, slots.data_ptr(), tokens)
        out = empty(tokens, columns, dtype=dtype)
        attend(
            config,
            query.data_ptr(),
            query.stride(0),
            query_starts.data_ptr(),
            context_lengths.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            context_lengths.shape[0],
            out.data_ptr(),
            columns,
        )
        return out

    return attention
