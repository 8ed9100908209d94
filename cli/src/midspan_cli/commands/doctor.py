"""``midspan doctor``: the machine, the installation, and how a model would run here."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midspan.settings import read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan.engine.step_loop import EngineCore
    from midspan.settings import EngineSettings
    from midspan.text.tokenizer import Tokenizer

FAILED = 1
SELF_TEST_PROMPT = "The capital of France is"
SELF_TEST_TOKENS = 8
RELATED = ("numpy", "torch", "tokenizers", "safetensors", "msgspec", "fastapi", "uvicorn", "uvloop", "httptools")


def doctor(
    *,
    model: Annotated[str | None, typer.Option(help="Also load this model and test it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    engine: EngineFlags,
) -> None:
    """Check this machine, and a model on it."""
    from midspan.devices.discovery import discover
    from midspan.errors import MidspanError
    from midspan_cli import device_listing

    catalogue = discover()
    report: dict[str, Any] = {
        "machine": _machine(),
        "versions": _versions(),
        "devices": device_listing.devices(catalogue),
        "unavailable": device_listing.absent(catalogue),
        "plugins": device_listing.plugins(catalogue),
    }
    if model is not None:
        try:
            report["model"] = _model_report(engine.settings(model), quiet=as_json)
        except MidspanError as error:
            report["model"] = {"name": model, "error": error.message, "remedy": error.remedy, "code": error.code}
    report["problems"] = _problems(report)
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report))
    if report["problems"]:
        raise typer.Exit(FAILED)


def _machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "usable_cores": usable,
        "memory_bytes": pages,
        "cache_folder": str(read_environment().cache_folder),
    }


def _versions() -> dict[str, str]:
    found = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name and (name.lower().replace("_", "-").startswith("midspan") or name.lower() in RELATED):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _model_report(settings: EngineSettings, *, quiet: bool) -> dict[str, Any]:
    from midspan.engine.loading import load_model
    from midspan.engine.model_location import locate_model
    from midspan.engine.model_text import load_model_text
    from midspan.engine.step_loop import EngineCore

    with StartupDisplay(quiet=quiet) as display:
        path = locate_model(settings, read_environment(), report=display.report)
        text = load_model_text(settings, path)
        loaded = load_model(settings, path, report=display.report)
    try:
        info = loaded.info
        return {
            "name": info.name,
            "path": info.path,
            "architecture": info.architecture,
            "device": info.device,
            "device_choice": info.device_choice,
            "dtype": info.dtype,
            "max_model_len": info.max_model_len,
            "memory": {
                "weights_bytes": info.weights_bytes,
                "cache_bytes": info.cache_bytes,
                "cache_tokens": info.cache_tokens,
                "cache_dtype": info.cache_dtype,
                "block_size": info.block_size,
                "device_free_bytes": loaded.device.memory().free_bytes,
            },
            "kernels": [
                {
                    "node": node.node,
                    "operation": node.op,
                    "kernel": node.kernel,
                    "fallback": node.fallback,
                    "refused": [{"kernel": kernel, "reason": reason} for kernel, reason in node.refused],
                }
                for node in loaded.program.placement.nodes
            ],
            "self_test": _self_test(EngineCore(loaded, settings), text.tokenizer),
        }
    finally:
        loaded.close()


def _self_test(core: EngineCore, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same greedy request twice at once: both must give the same tokens."""
    from midspan.decoding.sampling_params import SamplingParams
    from midspan.engine.messages import AddRequest, SequenceStart

    params = SamplingParams(temperature=0.0, max_tokens=SELF_TEST_TOKENS, ignore_eos=True, n=2)
    starts = [SequenceStart(index=index, seed=0) for index in range(params.n)]
    tokens: dict[int, list[int]] = {start.index: [] for start in starts}
    errors = []
    prompt_ids = tokenizer.encode(SELF_TEST_PROMPT)
    core.add(AddRequest(request_id="self-test", prompt_ids=prompt_ids, params=params, sequences=starts))
    news = core.take_events()
    while news or core.has_work():
        for event in news:
            tokens[event.index] += event.token_ids
            errors += [event.error] if event.error else []
        news = core.step().sequences if core.has_work() else []
    passed = not errors and tokens[0] == tokens[1] and len(tokens[0]) == SELF_TEST_TOKENS
    return {"passed": passed, "prompt": SELF_TEST_PROMPT, "text": tokenizer.decode(tokens[0]), "errors": errors}


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [
        f"The plugin {plugin['name']} of {plugin['distribution']} failed: {plugin['error']}"
        for plugin in report["plugins"]
        if plugin["status"] == "failed"
    ]
    model = report.get("model", {})
    if "error" in model:
        problems.append(f"The model {model['name']} cannot run: {model['error']} {model['remedy']}".strip())
    elif model and not model["self_test"]["passed"]:
        problems.append(f"The model {model['name']} failed its self-test.")
    return problems


def _text(report: dict[str, Any]) -> str:
    from midspan_cli.device_listing import readable

    machine = report["machine"]
    memory = readable(machine["memory_bytes"]) if machine["memory_bytes"] else "memory unknown"
    lines = [
        f"Machine   {machine['system']}, {machine['usable_cores']} cores, {memory}",
        f"Python    {machine['python']}",
        f"Packages  {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"Cache     {machine['cache_folder']}",
    ]
    lines += [f"Device    {item['id']}: {item['description']}" for item in report["devices"]]
    lines += [f"Absent    {item['name']}: {item['reason']}" for item in report["unavailable"]]
    if "self_test" in report.get("model", {}):
        lines += _model_text(report["model"])
    problems = report["problems"]
    lines += ["", *(f"Problem: {problem}" for problem in problems)] if problems else ["", "No problems found."]
    return "\n".join(lines)


def _model_text(model: dict[str, Any]) -> list[str]:
    from midspan_cli.device_listing import readable
    from midspan_cli.text_table import table

    memory, test = model["memory"], model["self_test"]
    rows = []
    for node in model["kernels"]:
        refused = "; ".join(f"{item['kernel']}: {item['reason']}" for item in node["refused"])
        rows.append((node["node"], node["operation"], node["kernel"] + (" (fallback)" * node["fallback"]), refused))
    return [
        "",
        f"Model     {model['name']} ({model['architecture']}) as {model['dtype']}",
        f"Runs on   {model['device_choice']}",
        f"Memory    weights {readable(memory['weights_bytes'])}, cache {readable(memory['cache_bytes'])} for "
        f"{memory['cache_tokens']} tokens as {memory['cache_dtype']}; up to {model['max_model_len']} tokens a request",
        f"Self-test {'passed' if test['passed'] else 'FAILED'}: {test['prompt']}{test['text']}",
        "",
        table(("NODE", "OPERATION", "KERNEL", "REFUSED"), rows),
    ]
