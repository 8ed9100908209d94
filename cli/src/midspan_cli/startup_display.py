"""Shows a person how far a start is: a live line on a terminal, plain lines elsewhere.

Writes to standard error only, so that standard output carries results alone.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from midspan.engine.status import StartupPhase
    from midspan.weights.download_progress import DownloadProgress

BYTES_PER_MEGABYTE = 1_000_000


class StartupDisplay:
    """A context in which phases are shown; ``report`` and ``report_download`` may be called from any thread.

    Args:
        stream: where to; None: standard error.
        quiet: show nothing.
    """

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._begun = time.monotonic()
        self._live = not quiet and self._stream.isatty()
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._shown: set[tuple[str, str]] = set()

    def __enter__(self) -> StartupDisplay:
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓[/green]"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)

    def close(self, *, complete: bool = True) -> None:
        """End the live line; may be called again.

        Args:
            complete: mark the last phase as done.
        """
        if self._progress is not None:
            if complete:
                self._finish_others("")
            self._progress.stop()
            self._progress = None

    def report(self, phase: StartupPhase) -> None:
        """Show a moment of an engine's start."""
        self._show(phase.name, phase.detail, phase.done, phase.total)

    def report_download(self, progress: DownloadProgress) -> None:
        """Show how far a download is."""
        total = progress.bytes_total
        detail = f"{progress.source} {progress.bytes_done / BYTES_PER_MEGABYTE:.0f} MB"
        self._show(progress.phase, detail, progress.bytes_done, total)

    def _show(self, name: str, detail: str, done: int | None, total: int | None) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._show_live(name, detail, done, total)
            return
        complete = total is not None and done is not None and done >= total
        key = (name, detail if total is None else ("complete" if complete else "begun"))
        if key in self._shown:
            return
        self._shown.add(key)
        counted = f" {done}/{total}" if total is not None and done is not None else ""
        seconds = time.monotonic() - self._begun
        print(f"[{seconds:6.1f} s] {name}{': ' if detail or counted else ''}{detail}{counted}", file=self._stream)
        self._stream.flush()

    def _show_live(self, name: str, detail: str, done: int | None, total: int | None) -> None:
        from rich.markup import escape

        if name not in self._tasks:
            self._finish_others(name)
            self._tasks[name] = self._progress.add_task(name, total=total, detail=escape(detail))
        self._progress.update(self._tasks[name], completed=done or 0, total=total, detail=escape(detail))

    def _finish_others(self, current: str) -> None:
        for name, task in self._tasks.items():
            if name != current:
                self._progress.update(task, total=1, completed=1)
