"""The page on capacity planning does what it says: its commands run here, and print what it shows."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midspan_cli.main import run

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[3] / "docs/benchmarks-and-planning.md"
COMPUTED = re.compile(r"computed in [\d.]+ s")
PLANNED = ("--load-format", "dummy", "--device-option", "numerics=off")


def documented_config() -> dict[str, Any]:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config: dict[str, Any] = json.loads(text)
    return config


def documented_runs() -> list[tuple[str, str]]:
    """Each console block's command and output."""
    blocks = re.findall(r"```console\n\$ (.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    runs = []
    for block in blocks:
        command, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
        runs.append((command.replace("\\\n", " "), output))
    return runs


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command line beside ``llama-8b`` and ``llama-70b``, config.json alone: status, output, errors."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
    for name, fields in (("llama-8b", {}), ("llama-70b", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**documented_config(), **fields}))
    logger = logging.getLogger("midspan")
    before = list(logger.handlers), logger.level, logger.propagate
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setenv("MIDSPAN_OFFLINE", "1")

    def finished(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield finished
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize("number", range(len(documented_runs())))
def test_a_documented_command_prints_what_the_page_shows(bench: Any, number: int) -> None:
    command, output = documented_runs()[number]
    program, *arguments = shlex.split(command)
    assert program == "midspan"
    status, printed, errors = bench(*arguments)
    assert status == 0, errors
    assert COMPUTED.sub("computed in N s", printed) == COMPUTED.sub("computed in N s", output)


def test_what_does_not_fit_one_accelerator_is_planned_on_several(bench: Any) -> None:
    load = ("--device", "simulated:h100", "--num-prompts", "20", "--input-len", "256", "--output-len", "16", "--json")
    status, _, errors = bench("bench", "llama-70b", *PLANNED, *load)
    assert status == 1
    assert "devices=N" in errors
    figures = []
    for devices in ("4", "8"):
        status, printed, errors = bench("bench", "llama-70b", *PLANNED, *load, "--device-option", f"devices={devices}")
        assert status == 0, errors
        figures.append(json.loads(printed))
    four, eight = figures
    assert eight["tpot_ms"]["mean"] < four["tpot_ms"]["mean"]
    assert eight["engine"]["cache_tokens"] > 1.5 * four["engine"]["cache_tokens"]


def test_a_request_alone_decodes_no_faster_than_its_weights_can_be_read(bench: Any) -> None:
    fields = ("--num-prompts", "1", "--input-len", "32", "--output-len", "32", "--json")
    graphs = ("--device-option", "captures_graphs=on")
    status, printed, errors = bench("bench", "llama-8b", *PLANNED, "--device", "simulated:h100", *graphs, *fields)
    assert status == 0, errors
    result = json.loads(printed)
    config = documented_config()
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    read = layers * (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * inner) + config["vocab_size"] * hidden
    bound = 2 * read / 3350e9 * 1000  # two bytes a number, 3,350 GB/s, in milliseconds
    assert bound < result["tpot_ms"]["mean"] < 1.2 * bound
