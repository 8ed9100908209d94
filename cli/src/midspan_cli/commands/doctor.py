"""``midspan doctor``: the machine, the installation, a device's self-test, and how a model would run here."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midspan.settings import EngineSettings, read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan.conformance.report import Report
    from midspan.devices.discovery import DeviceCatalogue
    from midspan.engine.loading import LoadedModel
    from midspan.engine.step_loop import EngineCore
    from midspan.text.tokenizer import Tokenizer

FAILED = 1
SELF_TEST_PROMPT = "The capital of France is"
SELF_TEST_TOKENS = 8
LARGEST_JUDGED_BYTES = 600_000_000
"""Weights of a model, as float32, that the reference is asked about as well: it takes some seconds for these."""
RELATED = ("numpy", "torch", "tokenizers", "safetensors", "msgspec", "fastapi", "uvicorn", "uvloop", "httptools")


def doctor(
    *,
    model: Annotated[str | None, typer.Option(help="Also load this model and test it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    engine: EngineFlags,
) -> None:
    """Check this machine; a device that is named, with a self-test of it; or a model.

    Alone it lists versions, devices and plugins, and what is wrong with them. --device NAME without a model runs the
    quick part of the conformance suite on that device, which takes up to a minute. --model MODEL loads the model, there
    or on what 'auto' takes: it shows where memory goes, which kernel serves each node and why others were refused, and
    generates a few tokens, which it holds against the reference where the model is small enough.
    """
    from midspan.errors import MidspanError
    from midspan_cli import device_listing

    settings = engine.settings(model or "")
    catalogue = device_listing.look_around()
    report: dict[str, Any] = {
        "machine": _machine(),
        "versions": _versions(),
        "devices": device_listing.devices(catalogue),
        "choice": _choice(catalogue, settings.device),
        "unavailable": device_listing.absent(catalogue),
        "plugins": device_listing.plugins(catalogue),
    }
    if model is not None:
        try:
            with redirect_stdout(sys.stderr):
                report["model"] = _model_report(settings, quiet=as_json)
        except MidspanError as error:
            report["model"] = {"name": model, "error": error.message, "remedy": error.remedy, "code": error.code}
    tested = None
    if model is None and settings.device != EngineSettings.device:
        tested = _device_test(settings, catalogue, quiet=as_json)
        report["conformance"] = tested.to_json()
    report["problems"] = _problems(report)
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report, tested))
    if report["problems"]:
        raise typer.Exit(FAILED)


def _choice(catalogue: DeviceCatalogue, asked: str) -> str:
    """What the device would be and why; for one that is not here, what is."""
    from midspan.devices.selection import select_device
    from midspan.errors import DeviceNotFound

    try:
        return select_device(catalogue, asked).explanation
    except DeviceNotFound as error:
        if asked != EngineSettings.device:
            raise
        return str(error)


def _device_test(settings: EngineSettings, catalogue: DeviceCatalogue, *, quiet: bool) -> Report:
    """The quick part of the conformance suite."""
    from midspan.conformance.subject import open_subject
    from midspan.conformance.suite import quick_checks, run_checks
    from midspan_cli.live_line import LiveLine

    line = LiveLine(quiet=quiet)
    line.heading = f"Testing {settings.device}: "
    with redirect_stdout(sys.stderr):
        subject = open_subject(settings.device, settings.device_options, catalogue)
        try:
            return run_checks(
                subject,
                quick_checks(subject),
                progress=lambda check, place, count: line.show(f"{place + 1} of {count}, {check.id}"),
            )
        finally:
            line.close()
            subject.close()


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
        report = {
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
        }
        tokens, errors = _generate(EngineCore(loaded, settings), text.tokenizer)
    finally:
        loaded.close()
    prompt = text.tokenizer.encode(SELF_TEST_PROMPT)
    verdict = _verdict(settings, loaded, prompt, tokens, errors)
    return report | {"self_test": {"prompt": SELF_TEST_PROMPT, "text": text.tokenizer.decode(tokens[0]), **verdict}}


def _verdict(
    settings: EngineSettings,
    loaded: LoadedModel,
    prompt: Sequence[int],
    tokens: dict[int, list[int]],
    errors: list[str],
) -> dict[str, Any]:
    """Both sequences must be whole and equal, and the reference must find each token the best or as good."""
    from midspan.errors import MidspanError

    found, not_judged = list(errors), None
    if tokens[0] != tokens[1] or len(tokens[0]) != SELF_TEST_TOKENS:
        found.append(f"The same greedy request gave the tokens {tokens[0]} and {tokens[1]}.")
    if not found:
        not_judged = _not_judged(settings, loaded)
        if not_judged is None:
            try:
                found += _judge(loaded, prompt, tokens[0])
            except MidspanError as error:
                not_judged = f"it cannot run this: {error.message}"
    return {"passed": not found, "errors": found, "not_judged": not_judged}


def _not_judged(settings: EngineSettings, loaded: LoadedModel) -> str | None:
    """Why the device's tokens are not held against the reference's; None where they are."""
    if not settings.reads_weights:
        return "its weights are random"
    if settings.quantization is not None:
        return "its weights were quantized here, and the reference has those of the files"
    size = 4 * sum(math.prod(weight.shape) for weight in loaded.graph.weights.values())
    if size > LARGEST_JUDGED_BYTES:
        return f"too large for the reference; midspan doctor --device {loaded.info.device} tests the device"
    return None


def _judge(loaded: LoadedModel, prompt: Sequence[int], tokens: list[int]) -> list[str]:
    """Hold tokens against the reference's choice after the same tokens; returns what is wrong."""
    from midspan.conformance.check import CheckFailed
    from midspan.conformance.engine_drive import Generated, LoadRequest
    from midspan.conformance.reference_judge import ReferenceJudge
    from midspan.conformance.tiny_model import TinyModel
    from midspan.devices.discovery import load_plugins, quantizations
    from midspan.weights.checkpoint import open_checkpoint
    from midspan.weights.published.catalogue import read_quantized

    info = loaded.info
    checkpoint = read_quantized(open_checkpoint(Path(info.path)), readers=quantizations(load_plugins()))
    model = TinyModel(name=info.name, graph=loaded.graph, checkpoint=checkpoint)
    generated = Generated(request=LoadRequest(prompt=tuple(prompt), outputs=len(tokens)), index=0, tokens=tokens)
    try:
        ReferenceJudge(model).judge([generated], info.dtype, info.cache_dtype)
    except CheckFailed as failed:
        return [str(failed)]
    return []


def _generate(core: EngineCore, tokenizer: Tokenizer) -> tuple[dict[int, list[int]], list[str]]:
    """The same greedy request twice at once: the tokens of both, and what went wrong."""
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
    return tokens, errors


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [
        f"The plugin {plugin['name']} of {plugin['distribution']} failed: {plugin['error']}"
        for plugin in report["plugins"]
        if plugin["status"] == "failed"
    ]
    failed = [check for check in report.get("conformance", {}).get("checks", []) if check["outcome"] == "failed"]
    if failed:
        problems.append(f"The device failed {len(failed)} checks: {', '.join(check['id'] for check in failed)}")
    model = report.get("model", {})
    if "error" in model:
        problems.append(f"The model {model['name']} cannot run: {model['error']} {model['remedy']}".strip())
    elif model and not model["self_test"]["passed"]:
        problems.append(f"The model {model['name']} failed its self-test: {' '.join(model['self_test']['errors'])}")
    return problems


def _text(report: dict[str, Any], tested: Report | None) -> str:
    from midspan.engine.cache_planning import readable_bytes

    machine = report["machine"]
    memory = readable_bytes(machine["memory_bytes"]) if machine["memory_bytes"] else "memory unknown"
    lines = [
        f"Machine   {machine['system']}, {machine['usable_cores']} cores, {memory}",
        f"Python    {machine['python']}",
        f"Packages  {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"Cache     {machine['cache_folder']}",
    ]
    lines += [f"Device    {item['id']}: {item['description']}" for item in report["devices"]]
    lines += [f"Absent    {item['name']}: {item['reason']}" for item in report["unavailable"]]
    lines += [f"Choice    {report['choice']}"]
    if tested is not None:
        from midspan.conformance.report import to_text

        lines += ["", to_text(tested)]
    if "self_test" in report.get("model", {}):
        lines += _model_text(report["model"])
    problems = report["problems"]
    lines += ["", *(f"Problem: {problem}" for problem in problems)] if problems else ["", "No problems found."]
    return "\n".join(lines)


def _model_text(model: dict[str, Any]) -> list[str]:
    from midspan.engine.cache_planning import readable_bytes
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
        f"Memory    weights {readable_bytes(memory['weights_bytes'])}, "
        f"cache {readable_bytes(memory['cache_bytes'])} for {memory['cache_tokens']} tokens "
        f"as {memory['cache_dtype']}; up to {model['max_model_len']} tokens a request",
        f"{_verdict_text(test)}: {test['prompt']}{test['text']}",
        "",
        table(("NODE", "OPERATION", "KERNEL", "REFUSED"), rows),
    ]


def _verdict_text(test: dict[str, Any]) -> str:
    if not test["passed"]:
        return "Self-test FAILED"
    if test["not_judged"]:
        return f"Generated (not held against the reference: {test['not_judged']})"
    return "Self-test passed, token by token as the reference"
