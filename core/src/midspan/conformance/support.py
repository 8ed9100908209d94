"""Mode ``support``: which kernel would serve what, and what is refused and why.

Compiles every case and runs none. Knows what a placement says, and no device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from midspan.conformance.case_fitting import fit
from midspan.conformance.check import Check
from midspan.conformance.operation_case import OperationCase
from midspan.conformance.operation_cases import operation_cases
from midspan.conformance.operation_run import Setting, compile_case
from midspan.conformance.packed_cases import packed_cases
from midspan.conformance.subject import Subject
from midspan.errors import UnsupportedOperation
from midspan.interface import OPERATIONS, Device
from midspan.weights.quantization import KNOWN_FORMATS

LEVEL = "support"
WHOLE = "whole graph"
"""Stands for a kernel's name where the device compiles graphs whole and names none."""


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A field of the matrix: an operation under conditions, in one type.

    Attributes:
        row: operation and conditions, for people.
        setting: how it is compiled.
        cases: makes them.
    """

    row: str
    setting: Setting
    cases: Callable[[], Sequence[OperationCase]]


def support_checks(subject: Subject) -> list[Check]:
    """One for each field; what it finds is the fact ``support``, a list of

    ``row``, ``dtype``, ``served`` {kernel: cases}, ``fallbacks`` [kernel], ``refused`` [{"kernel", "reason",
    "cases"}] (kernel "" for the device as a whole) and ``unfit`` [reason], cases beyond the device's limits.
    """
    fields = [*_operation_fields(subject), *_attention_fields(subject), *_packed_fields(subject)]
    named = [
        Check(
            level=LEVEL,
            name=f"{field.row}-{field.setting.dtype}".replace(" ", "-"),
            run=functools.partial(_fill, subject, field),
        )
        for field in fields
    ]
    return [*named, Check(level=LEVEL, name="collectives", run=lambda: _collectives(subject))]


def _operation_fields(subject: Subject) -> Iterator[_Field]:
    claims = subject.capabilities
    cases = operation_cases(claims.block_sizes[0])
    for op in OPERATIONS:
        mine = [case for case in cases if case.op == op]
        for dtype in claims.dtypes if op != "attention" else ():
            setting = Setting(dtype=dtype, cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
            yield _Field(row=op, setting=setting, cases=lambda mine=mine: mine)  # type: ignore[misc]


def _attention_fields(subject: Subject) -> Iterator[_Field]:
    claims = subject.capabilities
    for cache_dtype in claims.cache_dtypes:
        for size in claims.block_sizes:
            for dtype in claims.dtypes:
                yield _Field(
                    row=f"attention cache {cache_dtype} blocks {size}",
                    setting=Setting(dtype=dtype, cache_dtype=cache_dtype, block_size=size),
                    cases=functools.partial(_cases_of, "attention", size),
                )


def _packed_fields(subject: Subject) -> Iterator[_Field]:
    claims = subject.capabilities
    for name in KNOWN_FORMATS:
        for op in ("linear", "logits", "embedding") if name in claims.quantizations else ():
            for dtype in claims.dtypes:
                setting = Setting(dtype=dtype, cache_dtype=claims.cache_dtypes[0], block_size=claims.block_sizes[0])
                yield _Field(row=f"{op} {name}", setting=setting, cases=functools.partial(_packed_of, op, name))


def _cases_of(op: str, block_size: int) -> list[OperationCase]:
    return [case for case in operation_cases(block_size) if case.op == op]


def _packed_of(op: str, name: str) -> list[OperationCase]:
    return [case for case in packed_cases(name) if case.op == op]


def _fill(subject: Subject, field: _Field) -> None:
    served: dict[str, int] = {}
    fallbacks: set[str] = set()
    refused: dict[tuple[str, str], int] = {}
    unfit: list[str] = []
    device = subject.device()
    for case in field.cases():
        fitted = fit(case, device.capabilities)
        if isinstance(fitted, str):
            unfit.append(fitted)
            continue
        for kernel, is_fallback, refusals in _served(device, fitted, field.setting):
            if kernel:
                served[kernel] = served.get(kernel, 0) + 1
                fallbacks |= {kernel} if is_fallback else set()
            for refusal in refusals:
                refused[refusal] = refused.get(refusal, 0) + 1
    entry: dict[str, Any] = {
        "row": field.row,
        "dtype": field.setting.dtype,
        "served": served,
        "fallbacks": sorted(fallbacks),
        "refused": [{"kernel": name, "reason": why, "cases": count} for (name, why), count in refused.items()],
        "unfit": sorted(set(unfit)),
    }
    subject.facts["support"] = [entry]


def _served(
    device: Device, case: OperationCase, setting: Setting
) -> Iterator[tuple[str, bool, tuple[tuple[str, str], ...]]]:
    """(kernel or "", whether it is a fallback, refusals) for each node."""
    try:
        _, program = compile_case(device, case, setting)
    except UnsupportedOperation as refusal:
        yield "", False, (("", "; ".join(refusal.reasons) or refusal.message),)
        return
    nodes = program.placement.nodes
    program.close()
    if not nodes:
        yield WHOLE, False, ()
    for node in nodes:
        yield node.kernel, node.fallback, node.refused


def _collectives(subject: Subject) -> None:
    size = subject.capabilities.max_world_size
    subject.facts["max_world_size"] = size
