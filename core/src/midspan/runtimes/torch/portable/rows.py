"""Portable kernels of the operations that pick rows or columns: ``embedding``, ``select_rows``, ``split``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integers, number

Unary = Callable[[torch.Tensor], torch.Tensor]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels for ``embedding``, ``select_rows`` and ``split``."""

    def prepare_embedding(site: KernelSite) -> Unary:
        return _embedding(site, preparation)

    return (
        Kernel(name="portable", op="embedding", prepare=prepare_embedding),
        Kernel(name="portable", op="select_rows", prepare=lambda site: _select_rows),
        Kernel(name="portable", op="split", prepare=_split),
    )


def _embedding(site: KernelSite, preparation: Preparation) -> Unary:
    table = preparation.tensor(site.weights["weight"], torch_type(site.dtype))
    factor = number(site, "scale")

    def embedding(token_ids: torch.Tensor) -> torch.Tensor:
        rows = table.index_select(0, token_ids)
        return rows if factor == 1.0 else (rows.float() * factor).to(rows.dtype)

    return embedding


def _select_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows)


def _split(site: KernelSite) -> Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]:
    sizes = list(integers(site, "sizes"))
    if len(sizes) == 1:
        return lambda x: x

    def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split_with_sizes(x, sizes, dim=-1)

    return split
