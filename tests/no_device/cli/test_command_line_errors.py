"""Wrong usage and failures: one message with a remedy, the right status, no traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from midspan.errors import SettingsError
from midspan_cli.engine_flags import EngineFlags, human_integer, pairs
from midspan_cli.main import run

HEAVY = ("torch", "numpy", "fastapi", "uvicorn", "pluggy", "msgspec", "tokenizers", "jinja2", "rich", "asyncio")


def failed(done: Any, status: int, *texts: str) -> None:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr


def test_a_mistyped_command_gets_a_suggestion(midspan: Any) -> None:
    failed(midspan("serv"), 2, "Did you mean", "serve")


def test_a_mistyped_flag_gets_a_suggestion(midspan: Any) -> None:
    failed(midspan("serve", "--max-model-length", "5"), 2, "--max-model-len")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "model"),
        ("serve", "--port", "many"),
        ("serve", "--port", "70000"),
        ("serve", "--max-model-len", "4.5"),
        ("serve", "--max-num-seqs", "x"),
    ],
)
def test_wrong_usage_has_status_two(midspan: Any, arguments: tuple[str, ...]) -> None:
    failed(midspan(*arguments), 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "/no/such/model", "a"), "/no/such/model"),
        (("run", "team/model", "a"), "MIDSPAN_OFFLINE"),
        (("run", "m", "a", "--memory-utilization", "2"), "memory_utilization"),
        (("run", "m", "a", "--dtype", "float8"), "float32"),
        (("run", "m", "a", "--scheduling-policy", "random"), "fcfs"),
        (("run", "m", "a", "--device-option", "x"), "KEY=VALUE"),
        (("run", "m", "a", "--max-model-len", "0"), "max_model_len"),
        (("serve", "m", "--log-format", "xml"), "json"),
        (("serve", "m", "--metrics-compat", "other"), "vllm"),
        (("serve", "m", "--chat-template", "/no/such/file"), "/no/such/file"),
        (("serve", "m", "--host", "203.0.113.1"), "--host"),
        (("serve", "m", "--ssl-keyfile", "x"), "--ssl-certfile"),
        (("serve", "m", "--ssl-keyfile", "/no/key", "--ssl-certfile", "/no/cert"), "/no/cert"),
        (("serve", "m", "--root-path", "api"), "root_path"),
        (("run", "/no/such/model", "a", "--temperature", "-1"), "temperature"),
        (("chat", "/no/such/model", "--top-p", "7"), "top_p"),
        (("chat", "--url", "ftp://x"), "http"),
        (("bench", "--url", "http://127.0.0.1:9"), "cannot be reached"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(midspan: Any, arguments: tuple[str, ...], text: str) -> None:
    failed(midspan(*arguments), 1, "Error: ", text)


def test_an_unknown_device_is_answered_with_those_that_exist(midspan: Any, tiny_model: Path) -> None:
    failed(midspan("run", str(tiny_model), "a", "--device", "abacus"), 1, "abacus", "reference")


def test_debug_shows_the_traceback_wherever_it_stands(midspan: Any) -> None:
    for arguments in (("--debug", "run", "/no/model", "a"), ("run", "/no/model", "a", "--debug")):
        done = midspan(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_a_bad_prompt_or_parameter_ends_with_a_message(midspan: Any, tiny_model: Path) -> None:
    small = ("--device", "reference", "--kv-cache-memory-bytes", "4M", "--quiet")
    failed(midspan("run", str(tiny_model), "", *small), 1, "empty")
    failed(midspan("run", str(tiny_model), "a " * 2000, *small), 1, "maximum context length")
    failed(midspan("run", str(tiny_model), "a", "--temperature", "nan", *small), 1, "temperature")


def test_help_and_version_import_nothing_heavy() -> None:
    for flag in ("--help", "--version"):
        program = (
            "import sys\n"
            "from midspan_cli.main import run\n"
            f"status = run([{flag!r}])\n"
            f"print(status, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr.strip() == "0 []"
        assert "midspan" in done.stdout.lower()


def test_the_entry_point_itself_imports_next_to_nothing() -> None:
    program = (
        "import sys; import midspan_cli.main; print([name for name in ('typer', 'midspan') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Children hear control-C, even of a shell's background job, which starts with that signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_signals")
def test_control_c_while_a_model_is_loaded_ends_quietly(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "midspan_cli", "run", str(tiny_model), "a", "--device", "reference"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert first.startswith("[")
    assert process.returncode == 130
    assert all(line.startswith("[") for line in rest.splitlines()), rest


@pytest.mark.usefixtures("heard_signals")
def test_control_c_while_a_library_is_imported_ends_quietly(tmp_path: Path) -> None:
    # As numpy does: whatever goes wrong in an import is reported as a broken installation.
    (tmp_path / "touchy.py").write_text(
        "import os, signal, traceback\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    sum(range(10_000))\n"
        "except BaseException:\n    traceback.print_exc()\n    raise ImportError('broken') from None\n"
    )
    program = (
        "import sys, midspan_cli.main as entry\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "def run(arguments):\n    import touchy\n"
        "entry.run = run\n"
        "entry.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_serve_without_the_server_package_says_how_to_get_it() -> None:
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'midspan_api':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from midspan_cli.main import run\n"
        "sys.exit(run(['serve', 'm']) + 10 * run(['config', 'm']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install midspan-api" in done.stderr


def test_a_plugin_brings_a_command(tmp_path: Path) -> None:
    (tmp_path / "greeting_plugin.py").write_text(
        "import typer\n"
        "from midspan.interface import hookimpl\n"
        "@hookimpl\n"
        "def midspan_commands(app):\n"
        "    @app.command()\n"
        "    def greet(name: str) -> None:\n"
        "        typer.echo(f'hello {name}')\n"
    )
    info = tmp_path / "greeting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[midspan.plugins]\ngreeting = greeting_plugin\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom midspan_cli.main import run\n"
    program += "sys.exit(run(['greet', 'you']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello you\n"


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5G", 1610612736), ("2g", 2 * 10**9)]
)
def test_sizes_may_have_units(text: str, value: int) -> None:
    assert human_integer(text) == value


def test_pairs_are_checked() -> None:
    assert pairs("--kernel", ["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for bad in (["a"], ["=b"], ["a=1", "a=2"]):
        with pytest.raises(SettingsError):
            pairs("--kernel", bad)


def test_flags_left_out_give_the_settings_defaults() -> None:
    from midspan.settings import EngineSettings

    assert EngineFlags().settings("m") == EngineSettings(model="m")


def test_the_status_of_a_failure_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["graph", "/no/such/model"]) == 1
    assert run(["graph"]) == 2
    assert run(["--version"]) == 0
    assert "Error" in capsys.readouterr().err


def test_the_example_command_is_a_valid_request() -> None:
    import shlex

    from midspan_cli.commands.serve import curl_line

    words = shlex.split(curl_line("http://127.0.0.1:1", 'it\'s "mine"', chat=True, guarded=False))
    assert words[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == 'it\'s "mine"'
