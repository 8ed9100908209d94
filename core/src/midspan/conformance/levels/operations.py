"""Every operation in every claimed type, held against its definition; and what ``supports`` says is true.

Each case is a graph of one node, compiled and evaluated through the interface. A device
may refuse a case with a reason, which is counted; of each operation in each type, some
case must run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from midspan.conformance.case_fitting import fit, fitting
from midspan.conformance.check import Check, CheckFailed
from midspan.conformance.engine_drive import DriveSettings
from midspan.conformance.input_readers import changed_inputs, read_roles
from midspan.conformance.operation_case import NODE, OperationCase
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_run import Setting, compile_case, require_agreement
from midspan.conformance.packed_cases import packed_cases
from midspan.conformance.report import REFUSED
from midspan.conformance.subject import Subject
from midspan.conformance.tiny_model import CONFIGS, tiny_model
from midspan.errors import DeviceLost, UnsupportedOperation
from midspan.interface import OPERATIONS, Device, NodePlacement
from midspan.runtimes.reference.cached_rows import CACHE_TYPES
from midspan.weights.quantization import KNOWN_FORMATS

LEVEL = "operations"
SHOWN = 8
"""Failing cases that a message lists."""


def checks(subject: Subject) -> Sequence[Check]:
    """The level's checks."""
    return [
        *_plain_checks(subject),
        *_attention_checks(subject),
        *_input_checks(subject),
        *_kernel_checks(subject),
        *_packed_checks(subject),
        Check(level=LEVEL, name="placement-names-every-node", run=lambda: _hold_placement(subject), quick=True),
    ]


def _plain_checks(subject: Subject) -> Iterator[Check]:
    claims = subject.capabilities
    cases = operation_cases(claims.block_sizes[0])
    for dtype in claims.dtypes:
        setting = Setting(dtype=dtype, cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
        for op in OPERATIONS:
            if op != "attention":
                mine = [case for case in cases if case.op == op]
                run = functools.partial(_run_cases, subject, mine, setting)
                yield Check(level=LEVEL, name=f"{op}-{dtype}", run=run, quick=dtype == claims.dtypes[0])


def _attention_checks(subject: Subject) -> Iterator[Check]:
    """Each type with each cache type in the preferred block size, and each block size in the preferred types."""
    claims = subject.capabilities
    first = (claims.dtypes[0], claims.cache_dtypes[0], claims.block_sizes[0])
    wanted = [(dtype, cache, first[2]) for dtype in claims.dtypes for cache in claims.cache_dtypes]
    wanted += [(first[0], first[1], size) for size in claims.block_sizes[1:]]
    for dtype, cache_dtype, size in wanted:
        cases = functools.partial(_attention_cases, size)
        setting = Setting(dtype=dtype, cache_dtype=cache_dtype, block_size=size)
        yield Check(
            level=LEVEL,
            name=f"attention-{dtype}-cache-{cache_dtype}-blocks-{size}",
            run=functools.partial(_run_made_cases, subject, cases, setting),
            unclaimed=unknown_cache_type(cache_dtype),
            quick=(dtype, cache_dtype, size) == first,
        )


def unknown_cache_type(cache_dtype: str) -> str | None:
    """Why a claimed cache type cannot be held against the reference, or None."""
    if cache_dtype in CACHE_TYPES:
        return None
    return f"the cache type {cache_dtype} is the device's own, and the reference has none to compare it with"


def _input_checks(subject: Subject) -> Iterator[Check]:
    """In the preferred type: no operation writes to what other nodes read."""
    claims = subject.capabilities
    setting = Setting(dtype=claims.dtypes[0], cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
    plain = [case for case in operation_cases(claims.block_sizes[0]) if "strided" not in case.name]
    for op in OPERATIONS:
        mine = [case for case in plain if case.op == op and (op == "sample" or read_roles(case))]
        if mine:
            run = functools.partial(_hold_inputs, subject, mine, setting)
            yield Check(level=LEVEL, name=f"inputs-kept-by-{op}", run=run, quick=True)


def _hold_inputs(subject: Subject, cases: Sequence[OperationCase], setting: Setting) -> None:
    device, problems = subject.device(), []
    fitted = fitting(cases, device.capabilities)
    for case in fitted:
        try:
            problem = changed_inputs(device, case, setting)
        except UnsupportedOperation:
            continue  # Refusals are counted where the operation is run alone.
        if problem:
            problems.append(f"{case.name}: {problem}")
    if problems:
        _raise_all(problems, len(fitted))


def _hold_placement(subject: Subject) -> None:
    """A placement has one entry for each node of the graph, in their order."""
    device = subject.device()
    for name in CONFIGS:
        model = tiny_model(name)
        program = device.compile(model.graph, model.weights(), DriveSettings().bounds(device))
        placed = [(node.node, node.op) for node in program.placement.nodes]
        program.close()
        wanted = [(node.name, node.op) for node in model.graph.nodes]
        if placed != wanted:
            place = next(
                (place for place, pair in enumerate(zip(placed, wanted, strict=False)) if pair[0] != pair[1]),
                min(len(placed), len(wanted)),
            )
            raise CheckFailed(
                f"Program.placement of the model '{name}' has {len(placed)} nodes and the graph {len(wanted)}; "
                f"number {place} is {_shown(placed, place)} in the placement and {_shown(wanted, place)} in the graph"
            )


def _shown(nodes: Sequence[tuple[str, str]], place: int) -> str:
    return "{} ({})".format(*nodes[place]) if place < len(nodes) else "missing"


def _kernel_checks(subject: Subject) -> Iterator[Check]:
    claims = subject.capabilities
    cases = operation_cases(claims.block_sizes[0])
    for dtype in claims.dtypes:
        setting = Setting(dtype=dtype, cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
        for op in OPERATIONS:
            mine = [case for case in cases if case.op == op]
            unclaimed = unknown_cache_type(setting.cache_dtype) if op == "attention" else None
            yield Check(
                level=LEVEL,
                name=f"kernels-of-{op}-{dtype}",
                run=functools.partial(_hold_kernels, subject, mine, setting),
                unclaimed=unclaimed,
                quick=dtype == claims.dtypes[0] and op in ("linear", "rms_norm"),
            )


def _packed_checks(subject: Subject) -> Iterator[Check]:
    claims = subject.capabilities
    yield Check(level=LEVEL, name="quantizations-are-known", run=lambda: _require_known(subject), quick=True)
    for name in KNOWN_FORMATS:
        for dtype in claims.dtypes:
            setting = Setting(dtype=dtype, cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
            cases = functools.partial(_packed, name)
            yield Check(
                level=LEVEL,
                name=f"packed-{name}-{dtype}",
                run=functools.partial(_run_made_cases, subject, cases, setting),
                unclaimed=None if name in claims.quantizations else f"the quantization {name} is not claimed",
                quick=dtype == claims.dtypes[0],
            )


def _require_known(subject: Subject) -> None:
    unknown = sorted(set(subject.capabilities.quantizations) - set(KNOWN_FORMATS))
    if unknown:
        raise CheckFailed(
            f"claims {', '.join(unknown)}, which the core never gives; it knows {', '.join(KNOWN_FORMATS)}"
        )


def _packed(name: str) -> list[OperationCase]:
    return list(packed_cases(name))


def _attention_cases(block_size: int) -> list[OperationCase]:
    return [case for case in operation_cases(block_size) if case.op == "attention"]


def _run_made_cases(subject: Subject, make: Callable[[], list[OperationCase]], setting: Setting) -> None:
    _run_cases(subject, make(), setting)


def _run_cases(subject: Subject, cases: Sequence[OperationCase], setting: Setting) -> None:
    """Run cases; all that is wrong is said at once. Of each operation among them, one at least must run."""
    device = subject.device()
    problems: list[str] = []
    refusals: list[str] = []
    unserved = {case.op for case in cases}
    for case in cases:
        fitted = fit(case, device.capabilities)
        if isinstance(fitted, str):
            refusals.append(f"{case.name}: {fitted}")
            continue
        try:
            require_agreement(device, fitted, setting)
        except UnsupportedOperation as refusal:
            problems += _bad_refusal(fitted, refusal)
            refusals.append(f"{case.name}: {refusal}")
            continue
        except CheckFailed as failure:
            problems.append(str(failure))
        except DeviceLost:
            raise
        except Exception as error:
            problems.append(f"{case.name}: {type(error).__name__}: {error}")
        unserved.discard(case.op)
    if refusals:
        subject.facts[REFUSED] = refusals
    if problems:
        _raise_all(problems, len(cases))
    unserved = {op for op in unserved if not OPERATIONS[op].refusable}
    if unserved:
        raise CheckFailed(f"no case of {', '.join(sorted(unserved))} runs:\n" + "\n".join(refusals[:SHOWN]))


def _bad_refusal(case: OperationCase, refusal: UnsupportedOperation) -> list[str]:
    if refusal.node != NODE:
        return [
            f"{case.name}: refused without naming the node '{NODE}' (UnsupportedOperation.node is {refusal.node!r})"
        ]
    if not refusal.message.strip() and not any(reason.strip() for reason in refusal.reasons):
        return [f"{case.name}: refused without a reason"]
    return []


def _raise_all(problems: Sequence[str], cases: int, heading: str = "{problems} of {cases} cases") -> None:
    shown = "\n".join(f"- {problem}" for problem in problems[:SHOWN])
    more = f"\n- and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise CheckFailed(f"{heading.format(problems=len(problems), cases=cases)}:\n{shown}{more}")


def _hold_kernels(subject: Subject, cases: Sequence[OperationCase], setting: Setting) -> None:
    """Each kernel of the operation, asked for by name: it passes, or says why it does not serve the case."""
    device = subject.device()
    problems: list[str] = []
    seen: set[tuple[str, bool]] = set()
    fitted = fitting(cases, device.capabilities)
    for case in fitted:
        placed = placement_of(device, case, setting)
        if placed is None:
            continue
        problems += _unsaid(case, placed.refused)
        for name in (*(name for name, _ in placed.refused), *placed.others):
            forced = replace(setting, kernels={case.op: name})
            problems += _forced(device, case, forced, name)
        if (placed.kernel, placed.fallback) not in seen:
            seen.add((placed.kernel, placed.fallback))
            problems += _strict(device, case, setting, placed)
    if problems:
        _raise_all(problems, len(fitted), "{problems} problems of kernels in {cases} cases")


def placement_of(device: Device, case: OperationCase, setting: Setting) -> NodePlacement | None:
    """How a case's node is served; None where the device refuses it, or compiles graphs whole and says nothing."""
    try:
        _, program = compile_case(device, case, setting)
    except UnsupportedOperation:
        return None
    nodes = program.placement.nodes
    program.close()
    return nodes[0] if nodes else None


def _unsaid(case: OperationCase, refused: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{case.name}: kernel '{name}' refuses without a reason" for name, reason in refused if not reason.strip()]


def _forced(device: Device, case: OperationCase, setting: Setting, name: str) -> list[str]:
    try:
        run = require_agreement(device, case, setting)
    except CheckFailed as failure:
        return [f"asked for '{name}': {failure}"]
    except Exception as error:
        return [f"asked for '{name}': {case.name}: {type(error).__name__}: {error}"]
    placed = run.placed
    if placed is None or placed.kernel == name or name in dict(placed.refused):
        return [] if placed is None else _unsaid(case, placed.refused)
    return [f"asked for '{name}': {case.name}: '{placed.kernel}' serves it, and nothing says why '{name}' does not"]


def _strict(device: Device, case: OperationCase, setting: Setting, placed: NodePlacement) -> list[str]:
    """With ``strict``, a fallback is an error that gives reasons, and nothing else is."""
    try:
        _, program = compile_case(device, case, replace(setting, strict=True))
    except UnsupportedOperation as refusal:
        if placed.fallback:
            return _bad_refusal(case, refusal)
        return [f"{case.name}: '{placed.kernel}' is no fallback, and strict refuses it: {refusal}"]
    program.close()
    if placed.fallback:
        return [f"{case.name}: '{placed.kernel}' is marked as a fallback, and strict takes it without a word"]
    return []
