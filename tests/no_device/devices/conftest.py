"""Packages that tests install into a folder on the path."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from midspan.interface.version import INTERFACE_VERSION

DEVICE = """
from midspan.interface import DeviceInfo, DevicePlugin, Found, Unavailable, hookimpl

def probe():
    {probe}

def info(id, preference=10, memory_bytes=1, description="a box"):
    return DeviceInfo(id=id, description=description, memory_bytes=memory_bytes, preference=preference)

@hookimpl
def midspan_devices():
    return [DevicePlugin(name={name!r}, interface={interface!r}, probe=probe, open=lambda info, options: None)]
"""


@pytest.fixture(scope="session")
def device_source() -> Callable[..., str]:
    """Source of a package with one device: ``device_source(name, probe, interface)``."""

    def make(
        name: object = "box", probe: str = "return Found((info('box'),))", interface: object = INTERFACE_VERSION
    ) -> str:
        return DEVICE.format(name=name, probe=probe, interface=interface)

    return make


def write_package(
    folder: Path, distribution: str, source: str, *, version: str = "1.0", entry: str | None = None
) -> str:
    """A distribution of one module with one entry point, as pip leaves it. Returns the module's name."""
    module = distribution.replace("-", "_") + "_module"
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    facts = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (facts / "entry_points.txt").write_text(f"[midspan.plugins]\n{entry or distribution} = {module}\n")
    return module


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package of one module with one entry point: ``install(distribution, source, version=, entry=)``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(distribution: str, source: str, *, version: str = "1.0", entry: str | None = None) -> None:
        module = write_package(tmp_path, distribution, source, version=version, entry=entry)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


@pytest.fixture
def in_child(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with the installed packages on its path: ``in_child("-m", "midspan_cli", "devices")``."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run
