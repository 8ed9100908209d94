"""The tables of the modes ``speed`` and ``support``, from the facts in a report.

Knows those facts' fields, see ``speed.speed_checks`` and ``support.support_checks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def speed_table(rows: Rows) -> list[str]:
    """A line for each kernel of each case."""
    lines = [("CASE", "TYPE", "KERNEL", "MEDIAN", "SPREAD", "TIMES AS FAST")]
    for row in rows:
        if row["ratio"] is None:
            ratio = "alone"
        elif row["kernel"] == row["beside"]:
            ratio = "1 (compared with this)"
        else:
            ratio = f"{row['ratio']:.2f}"
        median, spread = (f"{row[name] * 1e6:,.1f} us" for name in ("median_seconds", "spread_seconds"))
        lines.append((row["case"], row["dtype"], row["kernel"], median, spread, ratio))
    return _aligned(lines)


def support_table(rows: Rows) -> list[str]:
    """The matrix: operations under conditions, one column for each type; then why kernels refused."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    fields = {(row["row"], row["dtype"]): row for row in rows}
    lines = [("OPERATION", *dtypes)]
    for name in dict.fromkeys(row["row"] for row in rows):
        lines.append((name, *(_cell(fields.get((name, dtype))) for dtype in dtypes)))
    table = [*_aligned(lines), "Numbers are cases; * marks a fallback to a portable kernel."]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for refusal in row["refused"]:
            said = f"{row['row'].split()[0]}, {refusal['kernel'] or 'the device'}: {refusal['reason']}"
            reasons.setdefault(said, []).append(row["dtype"])
        for reason in row["unfit"]:
            reasons.setdefault(f"{row['row'].split()[0]}, beyond the limits: {reason}", []).append(row["dtype"])
    said_of = [f"Refused by {what} ({', '.join(dict.fromkeys(names))})" for what, names in reasons.items()]
    return [*table, *([""] if said_of else []), *said_of]


def _cell(field: Mapping[str, Any] | None) -> str:
    if field is None:
        return ""
    marks = {kernel: "*" if kernel in field["fallbacks"] else "" for kernel in field["served"]}
    parts = [f"{kernel}{marks[kernel]} {count}" for kernel, count in field["served"].items()]
    refused = sum(refusal["cases"] for refusal in field["refused"] if not refusal["kernel"])
    return ", ".join([*parts, *([f"refused {refused}"] if refused else [])]) or "nothing"


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
