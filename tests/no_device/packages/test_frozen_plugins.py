"""Plugins that were built against an earlier interface, or this one, go on working as they are."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan.interface.version import INTERFACE_VERSION

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "compatibility"
DEVICES = {"midspan-frozen-0-9": ("frozen-whole", "frozen-kernels")}
"""Package -> its devices."""

CASES = [(package, device) for package, devices in DEVICES.items() for device in devices]
QUICK = {"frozen-whole": "caches or operations or engine or determinism", "frozen-kernels": "lifecycle or caches"}
"""Checks of the suite that are run here. The whole suite takes half a minute for each."""

Install = Callable[[str], Any]


def test_every_minor_of_this_major_has_a_package() -> None:
    major, minor = INTERFACE_VERSION
    snapshots = sorted((ROOT / "tests/architecture").glob(f"interface_{major}_*.json"))
    wanted = {f"midspan-frozen-{path.stem.removeprefix('interface_').replace('_', '-')}" for path in snapshots}
    assert f"midspan-frozen-{major}-{minor}" in wanted
    assert wanted <= set(DEVICES)
    assert {path.name for path in FOLDER.iterdir() if (path / "pyproject.toml").exists()} == set(DEVICES)


@pytest.mark.parametrize("package", DEVICES)
def test_a_package_states_the_version_that_it_was_built_against_and_knows_little_of_the_core(package: str) -> None:
    version = tuple(int(part) for part in package.split("-")[-2:])
    modules: set[str] = set()
    stated = []
    for path in sorted((FOLDER / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "midspan":
                modules.add(str(node.module))
            if isinstance(node, ast.keyword) and node.arg == "interface":
                stated.append(ast.literal_eval(node.value))
    assert stated == [version] * len(DEVICES[package])
    allowed = {"midspan.interface", "midspan.errors", "midspan.runtimes.reference"}
    assert modules <= {*allowed, "midspan.runtimes.reference.sampling"}


@pytest.mark.parametrize(("package", "device"), CASES)
def test_a_package_generates_what_the_reference_generates(
    package: str, device: str, install_as_a_stranger: Install, tiny_model: Path
) -> None:
    installed = install_as_a_stranger(f"compatibility/{package}")
    settings = {"kv_cache_memory_bytes": 4 * 2**20, "dtype": "float32", "max_num_batched_tokens": 48}
    tokens = installed.generate(device, tiny_model, **settings)
    assert tokens == installed.generate("reference", tiny_model, **settings)
    assert len({tuple(row) for row in tokens}) > 1


@pytest.mark.parametrize(("package", "device"), CASES)
def test_a_package_passes_the_conformance_suite(package: str, device: str, install_as_a_stranger: Install) -> None:
    report = install_as_a_stranger(f"compatibility/{package}").conformance(device, QUICK[device])
    assert report["counts"]["failed"] == 0
    levels = {check["level"] for check in report["checks"] if check["outcome"] == "passed"}
    assert levels == set(QUICK[device].split(" or "))
    assert report["counts"]["passed"] > 30
    assert report["plugin"]["distribution"] == package


def test_installing_leaves_nothing_in_the_source_tree(install_as_a_stranger: Install) -> None:
    for package in DEVICES:
        install_as_a_stranger(f"compatibility/{package}")
    listing = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "compatibility"]
    found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [name for name in found if "__pycache__" not in name] == []
