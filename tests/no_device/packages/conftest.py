"""Packages of this repository, installed and used as a stranger's: into a folder, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROMPTS = ["the quick brown", "a tale of two cities and of three bears", "to be or not", "zwölf", "fox", "dog"]

GENERATE = """
import json, sys
from midspan import LLM, SamplingParams

model, device, prompts, settings = json.loads(sys.argv[1])
with LLM(model, device=device, **settings) as llm:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


class StrangersPackage:
    """A package in a folder that only child processes have on their path."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*install, "--target", str(folder), str(source)], check=True, timeout=120)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python where the package is installed; a failure shows what it wrote."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done

    def generate(self, device: str, model: Path, **settings: Any) -> list[list[int]]:
        """Greedy tokens for ``PROMPTS``."""
        asked = json.dumps([str(model), device, PROMPTS, settings])
        tokens: list[list[int]] = json.loads(self.python("-c", GENERATE, asked).stdout.splitlines()[-1])
        return tokens

    def conformance(self, device: str, checks: str = "") -> Mapping[str, Any]:
        """The report of the suite, or of the checks that an expression selects; a failed check fails."""
        report = self.folder / f"{device}.json"
        selected = ["-k", checks] if checks else []
        suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "midspan.conformance"]
        self.python(*suite, "--device", device, "--conformance-report", str(report), *selected)
        content: Mapping[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return content


@pytest.fixture(scope="session")
def install_as_a_stranger(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], StrangersPackage]:
    """Install a package of this repository by its folder: ``install_as_a_stranger("examples/whole_graph_device")``."""
    installed: dict[str, StrangersPackage] = {}

    def install(source: str) -> StrangersPackage:
        if source not in installed:
            installed[source] = StrangersPackage(ROOT / source, tmp_path_factory.mktemp("installed"))
        return installed[source]

    return install
