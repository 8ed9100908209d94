"""The example device that takes whole graphs, installed and used as a stranger's."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = "examples/whole_graph_device"
ROOT = Path(__file__).resolve().parents[3]

QUICK = "caches or operations or engine"

Install = Callable[[str], Any]

INSIDE = """
import dataclasses
import numpy as np
from midspan.devices.discovery import discover
from midspan.devices.selection import select_device
from midspan.conformance.operation_cases import operation_cases
from midspan.errors import OutOfDeviceMemory, SettingsError, UnsupportedOperation
from midspan.interface import Bounds, CacheGroup, CacheLayout
from midspan_lattice.expression import constant, from_host, pointwise, reduce
from midspan_lattice.planning import plan

selected = select_device(discover(), "lattice")

# A chain that nobody else reads is one instruction, and a buffer is used again after its last reader.
x = from_host("x", (4, 8))
chain = pointwise(np.tanh, x * 2.0 + 1.0) * x
first = plan([chain])
assert len([i for i in first.instructions if not i.returns]) == 1, first.instructions
y = x
for _ in range(20):
    y = y + reduce(np.add, y, -1)
made = plan([y])
sizes = [item.shape[0] * item.shape[1] * 4 for _, item in made.buffers.values()]
assert made.nbytes < sum(sizes) / 4, (made.nbytes, sum(sizes))

# Steps of other sizes in one bucket share a plan; padding rows change nothing.
device = selected.plugin.open(selected.info, {})
case = next(c for c in operation_cases(block_size=6) if c.op == "linear" and c.inputs[0].shape[0] == 16)
bounds = Bounds(max_tokens=64, max_requests=4, max_context=64, max_sampled_rows=8, block_size=6,
                dtype="float32", cache_dtype="float32")
program = device.compile(case.graph(), case, bounds)
whole = program.evaluate({"x": case.inputs[0]})[0]
for rows in (16, 13, 9):
    found = program.evaluate({"x": case.inputs[0][:rows]})[0]
    assert found.shape[0] == rows
    assert np.allclose(found, whole[:rows], rtol=1e-5, atol=1e-5)
assert len(program._plans) == 2, list(program._plans)  # the largest, and one for 9 to 16 rows

# Memory is counted in tiles, runs out, and comes back.
before = device.memory()
layout = CacheLayout(groups=(CacheGroup(name="full", layers=2, kv_heads=1, key_size=3, value_size=5),),
                     block_size=6, dtype="float32")
(size,) = device.block_bytes(layout)
cache = device.allocate_cache(layout, (10,))
assert cache.memory_bytes() == 10 * size == device.memory().used_bytes - before.used_bytes
for asked, error in ((lambda: device.allocate_cache(layout, (10**7,)), OutOfDeviceMemory),
                     (lambda: device.compile(case.graph(), case, dataclasses.replace(bounds, max_tokens=161)),
                      SettingsError),
                     (lambda: device.compile(case.graph(), case, dataclasses.replace(bounds, block_size=16)),
                      SettingsError),
                     (lambda: selected.plugin.open(selected.info, {"colour": "red"}), SettingsError)):
    try:
        asked()
    except error as found:
        assert found.remedy
    else:
        raise AssertionError(error)
cache.close()
program.close()
assert device.memory().used_bytes == 0

# What it has no lowering for is refused with the node's name.
graph = case.graph()
node = dataclasses.replace(graph.nodes[0], op="dream")
try:
    device.compile(dataclasses.replace(graph, nodes=(node,)), case, bounds)
except UnsupportedOperation as found:
    assert found.node == "node" and found.reasons
else:
    raise AssertionError("a dream was compiled")
"""


def test_it_generates_what_the_reference_generates(install_as_a_stranger: Install, tiny_model: Path) -> None:
    example = install_as_a_stranger(EXAMPLE)
    settings = {"kv_cache_memory_bytes": 4 * 2**20, "dtype": "float32"}
    tokens = example.generate("lattice", tiny_model, **settings)
    assert tokens == example.generate("reference", tiny_model, **settings)


def test_it_passes_the_conformance_suite(install_as_a_stranger: Install) -> None:
    report = install_as_a_stranger(EXAMPLE).conformance("lattice", QUICK)
    assert report["counts"]["failed"] == 0
    assert report["counts"]["passed"] > 80
    assert report["plugin"]["distribution"] == "midspan-lattice"
    skipped = {check["message"] for check in report["checks"] if check["outcome"] == "skipped"}
    assert all("claimed" in message for message in skipped), skipped


def test_it_fuses_plans_buckets_and_counts_its_memory(install_as_a_stranger: Install) -> None:
    install_as_a_stranger(EXAMPLE).python("-c", INSIDE)


def test_it_takes_nothing_from_the_core_but_the_contract() -> None:
    modules = {
        node.module
        for path in (ROOT / EXAMPLE).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("midspan.")
    }
    allowed = {"midspan.interface", "midspan.interface.graph", "midspan.errors"}
    assert modules == {*allowed, "midspan.runtimes.reference.sampling"}
