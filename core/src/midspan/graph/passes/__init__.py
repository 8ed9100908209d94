"""Passes: pure functions Graph -> Graph, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from midspan.errors import SettingsError
from midspan.graph.passes.eliminate_dead import eliminate_dead
from midspan.graph.passes.fuse_add_norm import fuse_add_norm
from midspan.graph.passes.fuse_gated import fuse_gated
from midspan.graph.passes.keep_rows_to_sample import keep_rows_to_sample
from midspan.graph.passes.merge_projections import merge_projections
from midspan.graph.validation import validate
from midspan.interface.graph import Graph

PASSES: Mapping[str, Callable[[Graph], Graph]] = {
    "merge_projections": merge_projections,
    "fuse_gated": fuse_gated,
    "keep_rows_to_sample": keep_rows_to_sample,
    "fuse_add_norm": fuse_add_norm,
    "eliminate_dead": eliminate_dead,
}
"""Every pass by name, in the order in which they are applied.

Rows are kept before additions and norms are fused, because until then the
selection stands between the last addition and the final norm.
"""


def apply_passes(graph: Graph, *, until: str | None = None) -> Graph:
    """Apply the passes in order; the result of each is validated.

    Args:
        graph: as a builder made it.
        until: name of the last pass to apply; None: all.

    Raises:
        SettingsError: there is no pass ``until``.
        GraphError: a pass made an invalid graph.
    """
    if until is not None and until not in PASSES:
        raise SettingsError(f"There is no pass '{until}'.", remedy=f"Passes: {', '.join(PASSES)}.")
    for name, apply in PASSES.items():
        graph = apply(graph)
        validate(graph)
        if name == until:
            break
    return graph
