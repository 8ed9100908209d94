"""Portable kernel of ``attention``: paged, with every variation of the operation.

Request by request: the blocks that a query can see are gathered from the cache
and scored in float32. Only written slots are ever read, so what else the cache's
memory holds does not matter. Queries are taken a piece at a time, which bounds
the score matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.cache import LayerRows, TorchCache
from midspan.runtimes.torch.cached_rows import CachedRows
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.portable.normalization import runs_of
from midspan.runtimes.torch.preparation import OncePerStep, Preparation
from midspan.runtimes.torch.site_attributes import (
    integer,
    number,
    numbers,
    optional_integer,
    optional_number,
    text,
)

QUERIES_AT_A_TIME = 256

Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Some consecutive queries of one request, and the cached tokens that any of them sees.

    Attributes:
        rows: where the queries stand in the step.
        first: position of the first query.
        start: position of the first token that is seen.
        blocks: int64, the blocks that hold the tokens from ``start`` on.
        offset: place of ``start`` in the first of them.
        count: tokens seen.
    """

    rows: slice
    first: int
    start: int
    blocks: torch.Tensor
    offset: int
    count: int


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """How scores are made, from the node's attributes."""

    heads: int
    kv_heads: int
    scale: float
    window: int | None
    soft_cap: float | None
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """The kernel for ``attention``."""

    def prepare(site: KernelSite) -> Attend:
        return _attention(site, preparation)

    return (Kernel(name="portable", op="attention", prepare=prepare),)


def _attention(site: KernelSite, preparation: Preparation) -> Attend:
    group, layer, block_size = text(site, "group"), integer(site, "layer"), site.block_size
    key_size, value_size = integer(site, "key_size"), integer(site, "value_size")
    scoring = _scoring(site, preparation)
    pieces_of = preparation.shared(
        ("attention pieces", scoring.window, block_size),
        lambda: OncePerStep(lambda starts, lengths, table: _pieces(starts, lengths, table, scoring.window, block_size)),
    )
    places_of = preparation.shared(
        ("cache places", block_size), lambda: OncePerStep(lambda slots: _places(slots, block_size))
    )

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
        keys, values = cache.rows(group, layer)
        block, offset = places_of(slots)
        keys.put((block, slice(None), offset), runs_of(key, key_size))
        values.put((block, slice(None), offset), runs_of(value, value_size))
        result = query.new_empty((query.shape[0], scoring.heads, value_size))
        heads = runs_of(query, key_size)
        for piece in pieces_of(query_starts, context_lengths, block_table):
            result[piece.rows] = _attend(heads[piece.rows], (keys, values), piece, scoring)
        return result.flatten(1)

    return attention


def _scoring(site: KernelSite, preparation: Preparation) -> _Scoring:
    slopes = None
    if site.node.attributes["alibi_slopes"] is not None:
        slopes = torch.tensor(numbers(site, "alibi_slopes"), dtype=torch.float32, device=preparation.device)
    sinks = site.weights.get("sinks")
    return _Scoring(
        heads=integer(site, "heads"),
        kv_heads=integer(site, "kv_heads"),
        scale=number(site, "scale"),
        window=optional_integer(site, "window"),
        soft_cap=optional_number(site, "soft_cap"),
        slopes=slopes,
        sinks=None if sinks is None else preparation.vector(sinks, torch_type(site.dtype)),
    )


def _places(slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = slots.long()
    return slots // block_size, slots % block_size


def _pieces(
    query_starts: torch.Tensor, context_lengths: torch.Tensor, table: torch.Tensor, window: int | None, block_size: int
) -> list[_Piece]:
    starts, lengths, blocks = query_starts.tolist(), context_lengths.tolist(), table.long()
    pieces = []
    for request, length in enumerate(lengths):
        begin, end = starts[request], starts[request + 1]
        for row in range(begin, end, QUERIES_AT_A_TIME):
            last_row = min(row + QUERIES_AT_A_TIME, end)
            first = length - (end - row)
            stop = length - (end - last_row)
            start = 0 if window is None else max(0, first - window + 1)
            used = blocks[request, start // block_size : -(-stop // block_size)]
            piece = _Piece(
                rows=slice(row, last_row),
                first=first,
                start=start,
                blocks=used,
                offset=start % block_size,
                count=stop - start,
            )
            pieces.append(piece)
    return pieces


def _gather(cached: CachedRows, piece: _Piece) -> torch.Tensor:
    """float32 [kv_heads, tokens, head_size] of exactly the tokens that the piece sees."""
    tokens = cached.blocks(piece.blocks).transpose(0, 1).flatten(1, 2)
    return tokens[:, piece.offset : piece.offset + piece.count]


def _attend(query: torch.Tensor, layer: LayerRows, piece: _Piece, scoring: _Scoring) -> torch.Tensor:
    """The result [queries, heads, value_size] of one piece."""
    keys, values = _gather(layer[0], piece), _gather(layer[1], piece)
    rows, heads, key_size = query.shape
    shared = heads // scoring.kv_heads
    grouped = query.float().transpose(0, 1).reshape(scoring.kv_heads, shared * rows, key_size)
    scores = (grouped @ keys.transpose(1, 2)).view(heads, rows, piece.count).mul_(scoring.scale)
    if scoring.soft_cap is not None:
        scores = scores.div_(scoring.soft_cap).tanh_().mul_(scoring.soft_cap)
    device = query.device
    position = torch.arange(piece.first, piece.first + rows, device=device).unsqueeze(1)
    token = torch.arange(piece.start, piece.start + piece.count, device=device).unsqueeze(0)
    if scoring.slopes is not None:
        scores += scoring.slopes.view(-1, 1, 1) * (token - position)
    hidden = token > position
    if scoring.window is not None:
        hidden |= token <= position - scoring.window
    scores.masked_fill_(hidden, -torch.inf)
    weights = _softmax(scores, scoring.sinks).view(scoring.kv_heads, shared * rows, piece.count)
    return (weights @ values).view(heads, rows, values.shape[-1]).transpose(0, 1).to(query.dtype)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is None:
        return scores.softmax(dim=-1)
    extra = sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat((scores, extra), dim=-1).softmax(dim=-1)[..., :-1]
