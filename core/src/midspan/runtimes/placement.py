"""Chooses a kernel for each node of a graph, once, at compile.

Shared by the runtimes. Knows kernels by their records only: what they compute,
on which arrays and on what device is theirs.

Order: a kernel that ``Bounds.kernels`` names for the operation is asked first;
then the device's table and the runtime's portable kernels by falling priority,
at equal priority the table first, each in the order given. The first that
supports the site is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from midspan.errors import PluginError, SettingsError, UnsupportedOperation
from midspan.interface.device import Bounds
from midspan.interface.graph import Graph, Node
from midspan.interface.kernel import Kernel, KernelSite, No, NodePlacement, Placement, Support, Yes
from midspan.interface.operations import OPERATIONS
from midspan.interface.weights import PackedTensor

Choice = tuple[Kernel, KernelSite]


def choose_kernels(
    graph: Graph,
    table: Sequence[Kernel],
    portable: Sequence[Kernel],
    weights: Mapping[str, PackedTensor],
    bounds: Bounds,
    device_id: str,
) -> tuple[Placement, dict[str, Choice]]:
    """Choose a kernel for every node.

    Args:
        graph: validated.
        table: the device's own kernels.
        portable: the runtime's kernels for any device; taking one is a fallback, unless
            ``bounds.kernels`` asked for it or the table holds it too.
        weights: content of the graph's weights, by name.
        bounds: overrides, strictness and element types.
        device_id: for the record and for messages.

    Returns:
        The record for people, and for each node's name its kernel and the site it was
        chosen for, in execution order.

    Raises:
        PluginError: the table has two kernels of one name or one for no operation, or a kernel's
            ``supports`` raised or gave no answer.
        SettingsError: ``bounds.kernels`` names an operation or a kernel that does not exist.
        UnsupportedOperation: no kernel serves a node, or only a portable one does and
            ``bounds.strict`` is set; it carries every reason.
    """
    own = {id(kernel) for kernel in table}
    candidates = [*table, *(kernel for kernel in portable if id(kernel) not in own)]
    _check_table(table, device_id)
    _check_overrides(bounds, candidates)
    placements: list[NodePlacement] = []
    chosen: dict[str, Choice] = {}
    for node in graph.nodes:
        site = _site(graph, node, weights, bounds)
        kernel, placement = _place(site, candidates, own, bounds, device_id)
        placements.append(placement)
        chosen[node.name] = (kernel, site)
    return Placement(device=device_id, nodes=tuple(placements)), chosen


def _place(
    site: KernelSite, candidates: Sequence[Kernel], own: Collection[int], bounds: Bounds, device_id: str
) -> tuple[Kernel, NodePlacement]:
    """Choose for one node; ``own`` are the identities of the table's kernels."""
    node = site.node
    wanted = bounds.kernels.get(node.op)
    asked = _in_order(candidates, node.op, wanted)
    kernel, refused = _first_willing(site, asked, device_id)
    if kernel is None:
        raise _unsupported(node, refused, device_id, "no kernel serves it")
    fallback = id(kernel) not in own and kernel.name != wanted
    if fallback and bounds.strict:
        raise _unsupported(node, refused, device_id, f"only the portable kernel '{kernel.name}' serves it")
    others = tuple(other.name for other in asked[len(refused) + 1 :])
    placement = NodePlacement(
        node=node.name, op=node.op, kernel=kernel.name, fallback=fallback, refused=refused, others=others
    )
    return kernel, placement


def _check_table(table: Sequence[Kernel], device_id: str) -> None:
    seen: set[tuple[str, str]] = set()
    for kernel in table:
        if kernel.op not in OPERATIONS:
            raise _broken(kernel, device_id, "there is no such operation", f"Known: {', '.join(sorted(OPERATIONS))}.")
        if (kernel.op, kernel.name) in seen:
            raise _broken(kernel, device_id, "its table has two of that name", "Give each kernel a name of its own.")
        seen.add((kernel.op, kernel.name))


def _check_overrides(bounds: Bounds, candidates: Sequence[Kernel]) -> None:
    for op, name in bounds.kernels.items():
        if op not in OPERATIONS:
            known = ", ".join(sorted(OPERATIONS))
            raise SettingsError(f"There is no operation '{op}' to choose a kernel for.", remedy=f"Known: {known}.")
        names = [kernel.name for kernel in candidates if kernel.op == op]
        if name not in names:
            known = ", ".join(names) or "none"
            raise SettingsError(f"There is no kernel '{name}' for '{op}' here.", remedy=f"Kernels of '{op}': {known}.")


def _site(graph: Graph, node: Node, weights: Mapping[str, PackedTensor], bounds: Bounds) -> KernelSite:
    return KernelSite(
        node=node,
        inputs=tuple(graph.values[name] for name in node.inputs),
        outputs=tuple(graph.values[name] for name in node.outputs),
        weights={role: weights[name] for role, name in node.weights.items()},
        dtype=bounds.dtype,
        cache_dtype=bounds.cache_dtype,
        block_size=bounds.block_size,
        max_tokens=bounds.max_tokens,
        max_requests=bounds.max_requests,
        max_context=bounds.max_context,
        max_sampled_rows=bounds.max_sampled_rows,
    )


def _in_order(candidates: Sequence[Kernel], op: str, wanted: str | None) -> list[Kernel]:
    mine = [kernel for kernel in candidates if kernel.op == op]
    return sorted(mine, key=lambda kernel: (kernel.name != wanted, -kernel.priority))


def _first_willing(
    site: KernelSite, candidates: Sequence[Kernel], device_id: str
) -> tuple[Kernel | None, tuple[tuple[str, str], ...]]:
    refused: list[tuple[str, str]] = []
    for kernel in candidates:
        answer = _answer(kernel, site, device_id)
        if isinstance(answer, Yes):
            return kernel, tuple(refused)
        refused.append((kernel.name, answer.reason))
    return None, tuple(refused)


def _answer(kernel: Kernel, site: KernelSite, device_id: str) -> Support:
    remedy = f"Correct its 'supports', or take another one: --kernel {kernel.op}=NAME."
    try:
        answer = cast("object", kernel.supports(site))
    except Exception as error:
        problem = f"asked whether it supports node '{site.node.name}', it raised {error!r}"
        raise _broken(kernel, device_id, problem, remedy) from error
    if not isinstance(answer, (Yes, No)):
        problem = (
            f"asked whether it supports node '{site.node.name}', it returned {answer!r} and neither Yes() nor No(...)"
        )
        raise _broken(kernel, device_id, problem, remedy)
    return answer


def _broken(kernel: Kernel, device_id: str, problem: str, remedy: str) -> PluginError:
    return PluginError(
        f"The kernel '{kernel.name}' for '{kernel.op}' of device '{device_id}' is broken: {problem}.",
        plugin=device_id.partition(":")[0],
        remedy=remedy,
    )


def _unsupported(
    node: Node, refused: tuple[tuple[str, str], ...], device_id: str, problem: str
) -> UnsupportedOperation:
    reasons = tuple(f"{name}: {reason}" for name, reason in refused)
    listed = "; ".join(reasons) or f"there is no other kernel for '{node.op}'"
    return UnsupportedOperation(
        f"Device '{device_id}' cannot run node '{node.name}' ({node.op}): {problem}. Asked: {listed}.",
        node=node.name,
        reasons=reasons,
        remedy="Take another dtype, quantization or device, or start without --strict if it is set.",
    )
