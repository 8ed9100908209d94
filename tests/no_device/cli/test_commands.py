"""What each command prints, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--device", "reference", "--kv-cache-memory-bytes", "4M")


def test_run_prints_the_text_alone_and_progress_elsewhere(midspan: Any, tiny_model: Path) -> None:
    arguments = ("run", str(tiny_model), "the quick", "--temperature", "0", "--max-tokens", "6", *SMALL)
    first = midspan(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("\n")
    assert "compile" not in first.stdout
    assert "compile" in first.stderr
    second = midspan(*arguments, "--quiet")
    assert second.stdout == first.stdout
    assert second.stderr == ""


def test_run_reads_the_prompt_from_standard_input_and_applies_the_template(midspan: Any, tiny_model: Path) -> None:
    sampling = ("--temperature", "0", "--max-tokens", "6", "--quiet", *SMALL)
    plain = midspan("run", str(tiny_model), "-", *sampling, stdin="a tale")
    assert plain.stdout == midspan("run", str(tiny_model), "a tale", *sampling).stdout
    chat = midspan("run", str(tiny_model), "a tale", "--chat", *sampling)
    assert chat.returncode == 0
    assert chat.stdout != plain.stdout


def test_chat_answers_each_line_and_ends_with_the_input(midspan: Any, tiny_model: Path) -> None:
    done = midspan(
        "chat", str(tiny_model), "--temperature", "0", "--max-tokens", "4", *SMALL, stdin="hello\n\n/clear\nhello\n"
    )
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line]
    assert len(answers) >= 2


def test_graph_prints_the_model_before_and_after_passes(midspan: Any, tiny_model: Path) -> None:
    built = midspan("graph", str(tiny_model), "--after", "none")
    fused = midspan("graph", str(tiny_model))
    assert "q_proj" in built.stdout
    assert built.stdout != fused.stdout
    as_json = json.loads(midspan("graph", str(tiny_model), "--json").stdout)
    assert as_json["architecture"] == "LlamaForCausalLM"


def test_graph_names_the_passes_when_one_is_unknown(midspan: Any, tiny_model: Path) -> None:
    done = midspan("graph", str(tiny_model), "--after", "fuse")
    assert done.returncode == 1
    assert "merge_projections" in done.stderr


def test_devices_lists_what_is_here(midspan: Any) -> None:
    assert "reference" in midspan("devices").stdout
    listed = json.loads(midspan("devices", "--json").stdout)
    assert "reference" in [device["id"] for device in listed["devices"]]
    assert all(item["reason"] and item["remedy"] for item in listed["unavailable"])


def test_plugins_lists_versions_and_the_interface(midspan: Any) -> None:
    assert "reference" in midspan("plugins").stdout
    listed = json.loads(midspan("plugins", "--json").stdout)
    own = next(plugin for plugin in listed["plugins"] if plugin["name"] == "reference")
    assert own["interface"] == listed["interface"]
    assert own["status"] == "ok"


def test_doctor_checks_the_machine_and_a_model_on_it(midspan: Any, tiny_model: Path) -> None:
    done = midspan("doctor", "--model", str(tiny_model), *SMALL, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["usable_cores"] >= 1
    assert "midspan" in report["versions"]
    assert report["model"]["self_test"]["passed"] is True
    assert len(report["model"]["kernels"]) > 10
    assert {"node", "operation", "kernel", "fallback", "refused"} == set(report["model"]["kernels"][0])
    assert report["model"]["memory"]["cache_tokens"] > 0
    assert report["problems"] == []


def test_doctor_says_what_is_wrong_with_a_model(midspan: Any, tmp_path: Path) -> None:
    done = midspan("doctor", "--model", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "Problem:" in done.stdout


def test_config_tells_each_setting_and_its_origin(midspan: Any) -> None:
    done = midspan("config", "model-x", "--port", "9000", "--json", environment={"MIDSPAN_API_KEY": "secret-key"})
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["port"] == {"value": 9000, "origin": "flag"}
    assert shown["host"] == {"value": "127.0.0.1", "origin": "default"}
    assert shown["model"] == {"value": "model-x", "origin": "flag"}
    assert shown["cache_folder"]["origin"] == "environment"
    assert shown["api_key"]["origin"] == "environment"
    assert "secret-key" not in done.stdout


def test_pull_prints_where_a_local_model_lies(midspan: Any, tiny_model: Path) -> None:
    assert midspan("pull", str(tiny_model)).stdout.strip() == str(tiny_model)


@pytest.mark.parametrize("command", ["serve", "run", "chat", "bench", "pull", "graph", "doctor", "config"])
def test_every_command_explains_itself(midspan: Any, command: str) -> None:
    done = midspan(command, "--help")
    assert done.returncode == 0
    assert "Usage: midspan" in done.stdout


@pytest.mark.parametrize("command", ["serve", "bench", "doctor"])
def test_help_never_cuts_the_name_of_a_flag(midspan: Any, command: str) -> None:
    text = midspan(command, "--help", environment={"COLUMNS": "60", "TERMINAL_WIDTH": "60"}).stdout
    assert "--kv-cache-memory-bytes BYTES" in text
    assert "--memory-utilization, --gpu-memory-utilization" in text
    assert "\nDevice:\n" in text


def test_flags_of_serve_have_the_names_that_people_know(midspan: Any) -> None:
    text = midspan("serve", "--help", environment={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout
    flags = """
        --host --port --api-key --served-model-name --dtype --max-model-len --gpu-memory-utilization --max-num-seqs
        --max-num-batched-tokens --block-size --kv-cache-dtype --enable-prefix-caching --seed --scheduling-policy
        --device --device-option --kernel --strict --chat-template --shutdown-timeout --revision --tokenizer
        --max-queued-requests
    """
    assert [flag for flag in flags.split() if flag not in text] == []


def test_quantization_is_a_flag_of_every_command_that_loads_a_model(midspan: Any, tiny_model: Path) -> None:
    done = midspan("run", str(tiny_model), "the quick", "--quantization", "w8a16", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "8 linear weights became int8.channel (w8a16)" in done.stderr
    load = ("--num-prompts", "2", "--input-len", "4", "--output-len", "2")
    done = midspan("bench", str(tiny_model), "--quantization", "int8", *load, *SMALL)
    assert "weights: 8 linear weights became int8.dynamic" in done.stdout
    done = midspan("run", str(tiny_model), "the quick", "--quantization", "int3", *SMALL)
    assert done.returncode != 0
    assert "Take int8, w8a16, int4, fp8" in done.stderr
    for command in ("serve", "chat"):
        assert "--quantization" in midspan(command, "--help").stdout
