"""Paged attention by the native library, on the cache that this device allocates."""

from __future__ import annotations

from ctypes import addressof

import torch

from midspan.interface import Kernel, KernelSite, No, Support, Yes
from midspan.runtimes.torch.cache import TorchCache
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, numbers, optional_integer, optional_number, text
from midspan_cpu.kernels.native_operation import NativeOperation, Operands
from midspan_cpu.native_interface import OPERATIONS, Instruction
from midspan_cpu.native_library import ELEMENT_TYPES, AttentionConfig, NativeLibrary

PRIORITY = 20

BLOCK_MULTIPLE = 16


def kernels(preparation: Preparation, library: NativeLibrary) -> tuple[Kernel, ...]:
    """The kernel named ``native`` for ``attention``."""

    def prepare(site: KernelSite) -> NativeOperation:
        return _attention(site, preparation, library)

    return (Kernel(name="native", op="attention", prepare=prepare, supports=_supports, priority=PRIORITY),)


def _supports(site: KernelSite) -> Support:
    if site.block_size % BLOCK_MULTIPLE:
        return No(f"takes blocks of a multiple of {BLOCK_MULTIPLE} tokens, not {site.block_size}")
    if site.cache_dtype not in ELEMENT_TYPES:
        return No(f"reads no cache of {site.cache_dtype}")
    return Yes()


class _Layer:
    """One attention layer: its configuration, filled in with the addresses of the cache that it is run on."""

    def __init__(self, site: KernelSite, preparation: Preparation) -> None:
        self._group, self._layer = text(site, "group"), integer(site, "layer")
        self._slopes = None
        if site.node.attributes["alibi_slopes"] is not None:
            self._slopes = torch.tensor(numbers(site, "alibi_slopes"), dtype=torch.float32)
        sinks = site.weights.get("sinks")
        self._sinks = None if sinks is None else preparation.vector(sinks, torch_type(site.dtype))
        self._cache: object = None
        self._type = ELEMENT_TYPES[site.dtype]
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
            type=self._type,
            cache_type=ELEMENT_TYPES[site.cache_dtype],
        )

    def work_on(self, cache: TorchCache) -> None:
        """Take the addresses of a cache."""
        if cache.identity is not self._cache:
            keys, values = cache.layer(self._group, self._layer)
            self._config.key_cache, self._config.value_cache = keys.data_ptr(), values.data_ptr()
            self._config.blocks = keys.shape[0]
            self._cache = cache.identity

    def instructions(self, operands: Operands) -> tuple[Instruction, ...]:
        """Write this step's keys and values, then attend."""
        query, key, value = operands.matrices
        starts, lengths, table, slots = operands.integers
        config, rows = addressof(self._config), operands.rows
        write, attend = OPERATIONS["write_cache"], OPERATIONS["attention"]
        (out,) = operands.outputs
        return (
            Instruction(op=write, rows=rows, type=self._type, integers=(slots,), config=config, x=key, x2=value),
            Instruction(
                op=attend, rows=rows, type=self._type, integers=(starts, lengths, table), config=config, x=query, y=out
            ),
        )


def _attention(site: KernelSite, preparation: Preparation, library: NativeLibrary) -> NativeOperation:
    layer = _Layer(site, preparation)
    return NativeOperation(
        library=library,
        emit=layer.instructions,
        outputs=((integer(site, "heads") * integer(site, "value_size"), torch_type(site.dtype)),),
        integers=4,
        on_cache=layer.work_on,
        keep=layer,
    )
