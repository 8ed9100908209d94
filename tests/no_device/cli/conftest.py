"""Runs the command line inside the test's process, with its own output, input and environment."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from midspan_cli.main import run


@dataclass(frozen=True)
class Finished:
    """What one command left behind."""

    returncode: int
    stdout: str
    stderr: str


RunMidspan = Callable[..., Finished]


@pytest.fixture
def midspan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[RunMidspan]:
    """Run ``midspan`` with arguments: ``midspan("run", ..., stdin="", environment={...})``."""
    logger = logging.getLogger("midspan")
    before = list(logger.handlers), logger.level, logger.propagate

    def finished(*arguments: str, stdin: str = "", environment: dict[str, str] | None = None) -> Finished:
        variables = {"MIDSPAN_CACHE": str(tmp_path / "cache"), "MIDSPAN_OFFLINE": "1", "COLUMNS": "120"}
        with monkeypatch.context() as changes:
            for name, value in {**variables, **(environment or {})}.items():
                changes.setenv(name, value)
            changes.setattr("sys.stdin", io.StringIO(stdin))
            capsys.readouterr()
            status = run(arguments)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    yield finished
    logger.handlers[:], logger.level, logger.propagate = before
