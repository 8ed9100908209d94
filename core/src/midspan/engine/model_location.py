"""From a model's name to its files, with progress.

Apart from loading, because the process that serves looks for the model while the
process that computes opens its device.
"""

from __future__ import annotations

from pathlib import Path

from midspan.engine.status import Report, StartupPhase, ignore_phase
from midspan.settings import EngineSettings, Environment
from midspan.weights.download_progress import DownloadProgress
from midspan.weights.resolve import resolve_model


def locate_model(settings: EngineSettings, environment: Environment, *, report: Report = ignore_phase) -> Path:
    """Find the model's files, download them where they must be.

    Args:
        settings: names the model.
        environment: cache folder, and whether downloads are allowed.
        report: gets the download's progress.

    Raises:
        ModelNotFound: there is no such model, or it cannot be downloaded.
    """

    def progress(step: DownloadProgress) -> None:
        report(StartupPhase(name=step.phase, detail=step.source, done=step.bytes_done, total=step.bytes_total))

    return resolve_model(
        settings.model,
        environment=environment,
        revision=settings.revision,
        weights=settings.reads_weights,
        report=progress,
    )
