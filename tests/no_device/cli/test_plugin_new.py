"""``midspan plugin new`` writes a package that installs, runs models and passes the suite as it is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan.interface import INTERFACE_VERSION
from midspan_cli.plugin_package import SUFFIX, TEMPLATES, PluginPackage

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
CLI = ROOT / "cli"
CONFIG = ROOT / "pyproject.toml"

QUICK_CHECKS = """
from midspan.conformance.report import to_text
from midspan.conformance.subject import open_subject
from midspan.conformance.suite import all_checks, run_checks

subject = open_subject("loom")
quick = [check for check in all_checks(subject) if check.quick]
report = run_checks(subject, quick)
subject.close()
assert len(quick) > 50
assert not report.failed, to_text(report)
"""

SAME_TOKENS = """
import sys
from midspan import LLM, SamplingParams

prompts = ["the quick brown", "a tale of two", "to be or not"]
found = []
for device in ("reference", "loom"):
    llm = LLM(sys.argv[1], device=device, kv_cache_memory_bytes=4 * 2**20)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    found.append([output.outputs[0].token_ids for output in outputs])
assert "loom product" in llm.model.placement["linear"], llm.model.placement
assert found[0] == found[1], found
"""

OPTIONS = """
from midspan.errors import SettingsError
from midspan_loom.plugin import PLUGIN

(info,) = PLUGIN.probe().devices
assert PLUGIN.open(info, {"memory_bytes": "1000"}).memory().total_bytes == 1000
for options, text in (({"speed": "9"}, "has no option 'speed'"), ({"memory_bytes": "-1"}, "from 1 to")):
    try:
        PLUGIN.open(info, options)
    except SettingsError as error:
        assert text in str(error) and error.remedy, error
    else:
        raise AssertionError(options)
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def loom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated package, not installed."""
    folder = tmp_path_factory.mktemp("vendor") / "midspan-loom"
    PluginPackage(name="loom", package="midspan-loom", interface=INTERFACE_VERSION, core="0.1").write(folder)
    return folder


@pytest.fixture(scope="module")
def python(loom: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Run a child of this Python that finds the installed package: ``python(*arguments, cwd=...)``."""
    site = tmp_path_factory.mktemp("site")
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "MIDSPAN_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)

    def run(*arguments: str, cwd: Path = site) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False
        )

    done = run(*command, str(site), str(loom), cwd=loom)
    assert done.returncode == 0, done.stderr
    return run


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_writes_a_package_and_says_what_comes_next(midspan: Any, tmp_path: Path) -> None:
    folder = tmp_path / "chips" / "first"
    done = midspan("plugin", "new", "my_chip", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    project = (folder / "pyproject.toml").read_text()
    assert 'name = "midspan-my-chip"' in project
    assert '[project.entry-points."midspan.plugins"]\nmy_chip = "midspan_my_chip.plugin"' in project
    assert f"INTERFACE = {INTERFACE_VERSION}" in (folder / "src/midspan_my_chip/plugin.py").read_text()
    for path in (".github/workflows/ci.yml", ".gitignore", "README.md", "src/midspan_my_chip/py.typed", "tests"):
        assert (folder / path).exists(), path
        assert path == "tests" or f"{folder / path}" in done.stdout
    assert f"pip install -e {folder}" in done.stdout
    assert "midspan.conformance --device my_chip" in done.stdout


def test_the_package_may_have_a_name_of_its_own(midspan: Any, tmp_path: Path) -> None:
    done = midspan("plugin", "new", "chip", "--package", "acme-chip-midspan", "--folder", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/src/acme_chip_midspan/device.py").exists()
    assert '"acme_chip_midspan.plugin"' in (tmp_path / "new/pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("MyChip",), ("'MyChip' cannot be a device's name", "lower case")),
        (("8bit",), ("'8bit'", "a letter first")),
        (("my-chip",), ("'my-chip'", "my_chip")),
        (("class",), ("'class'",)),
        (("../x",), ("'../x'",)),
        (("auto",), ("'auto' is taken by Midspan itself", "another name")),
        (("reference",), ("'reference' is taken",)),
        (("cli",), ("'midspan_cli' is installed already",)),
        (("chip", "--package", "My Chip"), ("'My Chip' cannot be the package's name",)),
        (("chip", "--package", "midspan"), ("'midspan' is installed already",)),
    ],
)
def test_a_name_that_cannot_work_is_refused_with_a_remedy_and_nothing_is_written(
    midspan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = midspan("plugin", "new", *arguments)
    assert done.returncode == 1
    for text in texts:
        assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_an_installed_plugin_is_refused(loom: Path, python: Python, tmp_path: Path) -> None:
    done = python("-m", "midspan_cli", "plugin", "new", "loom", "--package", "other-loom", cwd=tmp_path)
    assert done.returncode == 1
    assert "'loom' is taken by an installed plugin" in done.stderr


def test_a_folder_that_holds_something_is_left_as_it_is(midspan: Any, tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    done = midspan("plugin", "new", "chip", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert "nothing in it is overwritten" in done.stderr
    assert "--folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    done = midspan("plugin", "new", "chip", "--folder", str(kept))
    assert done.returncode == 1
    assert kept.read_text() == "mine"


def test_the_generated_code_is_clean(loom: Path, python: Python) -> None:
    succeeded(python("-m", "ruff", "format", "--check", "--no-cache", ".", cwd=loom))
    succeeded(python("-m", "ruff", "check", "--no-cache", ".", cwd=loom))
    succeeded(python("-m", "mypy", "--python-executable", sys.executable, cwd=loom))


def test_no_word_of_a_template_is_left_open(loom: Path) -> None:
    for path in loom.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".yml"):
            text = path.read_text()
            assert "@" not in text.replace("@v4", "").replace("@v5", "").replace("@hookimpl", "").replace(
                "@pytest", ""
            ).replace("@dataclass", "").replace(" @ ", ""), path


def test_the_generated_device_is_listed_and_gives_the_tokens_of_the_reference(python: Python, tiny_model: Path) -> None:
    assert "loom, computed by the host" in succeeded(python("-m", "midspan_cli", "devices"))
    assert "midspan-loom 0.1.0" in succeeded(python("-m", "midspan_cli", "plugins"))
    succeeded(python("-c", SAME_TOKENS, str(tiny_model)))


def test_its_option_is_checked(python: Python) -> None:
    succeeded(python("-c", OPTIONS))


def test_its_own_tests_pass(loom: Path, python: Python) -> None:
    assert " passed" in succeeded(
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_linear.py", cwd=loom)
    )


def test_it_passes_the_quick_checks_of_every_level(python: Python) -> None:
    """The whole suite takes longer; it is the package's own tests/test_conformance.py."""
    succeeded(python("-c", QUICK_CHECKS))


def test_every_template_is_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(CLI)], check=True, timeout=100)
    (wheel,) = tmp_path.glob("midspan_cli-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(SUFFIX)}
    wanted = {
        f"midspan_cli/plugin_template/{path.relative_to(TEMPLATES).as_posix()}"
        for path in TEMPLATES.rglob("*" + SUFFIX)
    }
    assert inside == wanted
    assert len(wanted) > 10
