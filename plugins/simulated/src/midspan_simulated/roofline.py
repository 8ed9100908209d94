"""How long a step takes: the roofline of an accelerator over the work of a graph.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model for multicore architectures", Communications of the ACM 52, 2009): a node takes the longer of its
operations over the peak and its bytes over the bandwidth. Added to it: a launch for each node, or one for
the step where nodes are captured or compiled together; the exchange between devices; and the way of the
batch to the device and of the tokens back. Knows no weight's content and runs nothing.

Invariant: more tokens, longer contexts or more requests never take less time, nor do smaller
figures of a sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midspan.interface.batch import Batch
from midspan_simulated.data_sheet import DataSheet
from midspan_simulated.node_work import AttentionWork, GraphWork
from midspan_simulated.ring import Ring

LAUNCH_SECONDS = 5e-6
"""For one node. No vendor publishes it; measurements of GPU launches from the host lie between 4 and 6 microseconds
(https://susun-blog.com/blog/pegainfer-3-cuda-graph). The same for all sheets."""

HOST_LINK_BANDWIDTH = 32e9
"""Bytes per second between host and device: PCI Express 4.0 x16 in one direction. The same for all sheets."""

HOST_LINK_LATENCY = 10e-6
"""Seconds for each of the two ways. An assumption, the same for all sheets; beside a launch of the whole step it
is of the same size, beside a step of milliseconds it is nothing."""

HOST_BYTES_PER_SAMPLED_ROW = 4
"""A token id."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device, or each of several, does in a second.

    Attributes:
        operations: in the activation type.
        bandwidth: bytes to and from its memory.
        ring: its way to the others.
        launches_once: a step is one launch.
    """

    operations: float
    bandwidth: float
    ring: Ring
    launches_once: bool = False


def rates_of(
    sheet: DataSheet,
    dtype: str,
    *,
    devices: int = 1,
    compute_efficiency: float = 1.0,
    bandwidth_efficiency: float = 1.0,
    captures_graphs: bool = False,
) -> Rates:
    """What a sheet's figures come to.

    Args:
        sheet: the accelerator.
        dtype: activation type, one of the sheet's.
        devices: in the group; with more than one the sheet must have a link.
        compute_efficiency, bandwidth_efficiency: shares of the figures that are reached.
        captures_graphs: steps are captured.
    """
    peak = sheet.peaks[dtype]
    link = sheet.link_bandwidth or sheet.bandwidth
    return Rates(
        operations=peak * compute_efficiency,
        bandwidth=sheet.bandwidth * bandwidth_efficiency,
        ring=Ring(devices=devices, bandwidth=link * bandwidth_efficiency),
        launches_once=captures_graphs or sheet.compiled_whole,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class StepShape:
    """What of a batch decides its time.

    Attributes:
        tokens: T.
        sampled: S.
        new: int64 [B], new tokens of each request.
        contexts: int64 [B], its tokens in the cache, the new ones included.
        host_bytes: of the batch's arrays.
    """

    tokens: int
    sampled: int
    new: NDArray[np.int64]
    contexts: NDArray[np.int64]
    host_bytes: int


def shape_of(batch: Batch) -> StepShape:
    """Look at a batch."""
    arrays = [batch.token_ids, batch.positions, batch.query_starts, batch.context_lengths, batch.rows_to_sample]
    arrays += [*batch.block_tables.values(), *batch.slots.values()]
    return StepShape(
        tokens=len(batch.token_ids),
        sampled=len(batch.rows_to_sample),
        new=np.diff(batch.query_starts).astype(np.int64),
        contexts=batch.context_lengths.astype(np.int64),
        host_bytes=sum(array.nbytes for array in arrays),
    )


def step_seconds(work: GraphWork, rates: Rates, shape: StepShape) -> float:
    """How long a step takes.

    Args:
        work: of the graph, on each device.
        rates: of each device.
        shape: of the batch.
    """
    counts = {"T": shape.tokens, "S": shape.sampled}
    seconds = (1 if rates.launches_once else work.launches) * LAUNCH_SECONDS
    for node, times in work.nodes:
        rows = counts.get(node.rows, 1)
        bound = max(
            rows * node.operations / rates.operations,
            (node.weight_bytes(rows) + rows * node.row_bytes) / rates.bandwidth,
        )
        exchange = rates.ring.all_reduce(rows * node.summed_bytes) if node.summed_bytes else 0.0
        exchange += rates.ring.all_gather(rows * node.gathered_bytes) if node.gathered_bytes else 0.0
        seconds += times * (bound + exchange)
    seconds += sum(times * _attention_seconds(attention, rates, shape) for attention, times in work.attentions)
    return seconds + _host_seconds(shape)


def seen_pairs(new: NDArray[np.int64], contexts: NDArray[np.int64], window: int | None) -> int:
    """Pairs of a new token and a token that it sees, itself included, over all requests."""
    return int(np.sum(_pairs_before(contexts, window) - _pairs_before(contexts - new, window)))


def read_tokens(new: NDArray[np.int64], contexts: NDArray[np.int64], window: int | None) -> int:
    """Cached tokens that any new token sees, over all requests, the new ones included."""
    return int(np.sum(contexts if window is None else np.minimum(contexts, window + new - 1)))


def _pairs_before(length: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """Pairs in a sequence's first ``length`` tokens."""
    whole = length if window is None else np.minimum(length, window)
    pairs: NDArray[np.int64] = whole * (whole + 1) // 2
    return pairs if window is None else pairs + (length - whole) * window


def _attention_seconds(attention: AttentionWork, rates: Rates, shape: StepShape) -> float:
    operations = attention.pair_operations * seen_pairs(shape.new, shape.contexts, attention.window)
    moved = attention.token_bytes * (read_tokens(shape.new, shape.contexts, attention.window) + shape.tokens)
    moved += attention.row_bytes * shape.tokens
    return max(operations / rates.operations, moved / rates.bandwidth)


def _host_seconds(shape: StepShape) -> float:
    moved = shape.host_bytes + HOST_BYTES_PER_SAMPLED_ROW * shape.sampled
    return moved / HOST_LINK_BANDWIDTH + 2 * HOST_LINK_LATENCY
