"""Folders of unpacked models that appear whole or not at all.

A model is unpacked in a staging folder beside its final place and renamed into
it when it is complete, so that neither a killed process nor two at once leave a
half model. Each stored folder has a marker with the sizes and digests of
its files. What the files are is not known here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midspan.errors import ModelNotFound

_MARKER = "midspan-model.json"
_STAGING_PREFIX = ".unfinished-"
_ABANDONED_SECONDS = 24 * 3600
_RENAME_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a model.

    Attributes:
        size: bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class UnpackedModel:
    """A complete model in a staging folder.

    Attributes:
        folder: where it lies.
        entry: the file in it that is the model, or "." for the folder itself.
        files: path in the folder, with slashes -> its size and digest.
    """

    folder: Path
    entry: str
    files: Mapping[str, StoredFile]


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """An empty folder on the disk of ``parent``, removed at the end with what is left in it.

    Raises:
        ModelNotFound: the disk refuses to keep the model.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=parent))
    except OSError as error:
        raise _cannot_store(parent, error) from error
    try:
        yield folder
    except OSError as error:
        raise _cannot_store(parent, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_store(folder: Path, error: OSError) -> ModelNotFound:
    return ModelNotFound(
        f"The model cannot be kept in {folder}: {error.strerror or error}.",
        remedy="Make room there, or set MIDSPAN_CACHE to a folder that can be written.",
    )


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed processes left a day ago or earlier."""
    for folder in parent.glob(f"{_STAGING_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def store(model: UnpackedModel, place: Path) -> Path:
    """Move a complete model to its place.

    Args:
        model: in a staging folder on the same disk.
        place: its folder. If another process stored the same there meanwhile, that one is kept; what is
            there and not valid is removed.

    Returns:
        The model's file or folder at its place.

    Raises:
        OSError: the disk refuses.
    """
    marker = {
        "entry": model.entry,
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in model.files.items()},
    }
    with (model.folder / _MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_RENAME_ATTEMPTS):
        try:
            model.folder.rename(place)
            break
        except OSError:
            if _marker(place) == marker and _entry(place, None) is not None:
                break
            if attempt == _RENAME_ATTEMPTS - 1:
                raise
            with suppress(FileNotFoundError):
                place.rename(model.folder.parent / f"replaced-{attempt}")
    return place / model.entry


def find_stored(folder: Path, version: str | None, sha256: str | None) -> Path | None:
    """A model that was stored before.

    Args:
        folder: holds one folder for each version.
        version: None: any, the last stored first.
        sha256: digest that one of its files must have; None: any.

    Returns:
        The model's file or folder; None when there is none, or it is not what was stored.
    """
    if version is not None:
        return _entry(folder / version, sha256)
    try:
        markers = sorted(folder.glob(f"[!.]*/{_MARKER}"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    return next((entry for entry in (_entry(path.parent, sha256) for path in markers) if entry is not None), None)


def _marker(place: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((place / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _entry(place: Path, sha256: str | None) -> Path | None:
    """The model at a place if marker, sizes and the wanted digest agree.

    Sizes and the recorded digests are compared; hashing the files again would read all of them
    at every start.
    """
    marker = _marker(place)
    if marker is None:
        return None
    try:
        digests = {file["sha256"] for file in marker["files"].values()}
        complete = all((place / name).stat().st_size == file["size"] for name, file in marker["files"].items())
        entry = place / marker["entry"]
    except (OSError, KeyError, TypeError, AttributeError):
        return None
    return entry if complete and (sha256 is None or sha256 in digests) else None
