"""``midspan bench``: how fast a model runs here, or a server answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midspan.errors import MidspanError
from midspan.settings import DEFAULT_MODEL, read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.load_report import RequestTiming, summarize
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan.engine.async_engine import AsyncEngine
    from midspan.settings import EngineSettings
    from midspan_cli.remote_server import RemoteServer

FAILED = 1
COMMON_IDS = 1000
"""Token ids below this exist in the vocabulary of any server."""


def bench(
    model: Annotated[
        str | None, typer.Argument(help=f"Folder, .gguf file, hub name or pypi:PACKAGE. Default: {DEFAULT_MODEL}")
    ] = None,
    *,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests, all sent at once.")] = 64,
    url: Annotated[str | None, typer.Option(help="Load the server at this address instead.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key for that server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    engine: EngineFlags,
) -> None:
    """Measure speed, here or of a running server. Prompts are random token ids."""
    if url is not None:
        from midspan_cli.remote_server import RemoteServer

        server = RemoteServer(url=url, api_key=api_key or read_environment().api_key)
        result = _load_server(server, model, input_len, output_len, num_prompts)
    else:
        settings = engine.settings(model or DEFAULT_MODEL)
        result = _load_engine(settings, input_len, output_len, num_prompts, quiet=as_json)
    typer.echo(json.dumps(result, indent=2) if as_json else _text(result))
    if result["failed"]:
        raise typer.Exit(FAILED)


def random_prompts(count: int, length: int, vocabulary: int, *, seed: int | None) -> list[list[int]]:
    """Prompts of token ids.

    Args:
        count: of prompts.
        length: tokens of each.
        vocabulary: ids are below it.
        seed: the same seed gives the same prompts; None: new ones, which no server has in its prefix cache.
    """
    source = random.Random(seed)
    return [[source.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _load_engine(
    settings: EngineSettings, input_len: int, output_len: int, count: int, *, quiet: bool
) -> dict[str, Any]:
    from midspan_cli.local_engine import LocalEngine

    display = StartupDisplay(quiet=quiet)
    with display, LocalEngine(settings, read_environment(), display.report) as local:
        display.close()
        vocabulary = local.engine.model.vocab_size
        prompts = random_prompts(count, input_len, vocabulary, seed=0)
        # Another prompt than those to be measured: what was seen is cached.
        local.call(_time_all(local.engine, random_prompts(1, input_len, vocabulary, seed=1), 1))
        begun = time.monotonic()
        timings = local.call(_time_all(local.engine, prompts, output_len))
        seconds = time.monotonic() - begun
        info = local.engine.model
    summary = summarize(timings, input_tokens=input_len * count, seconds=seconds)
    return {"model": info.name, "device": info.device, "dtype": info.dtype, **summary}


async def _time_all(engine: AsyncEngine, prompts: list[list[int]], output_len: int) -> list[RequestTiming]:
    work = [_time_one(engine, prompt, output_len, f"bench-{number}") for number, prompt in enumerate(prompts)]
    return list(await asyncio.gather(*work))


async def _time_one(engine: AsyncEngine, prompt: list[int], output_len: int, request_id: str) -> RequestTiming:
    from midspan.decoding.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    timing = RequestTiming(start=time.monotonic())
    try:
        async for output in await engine.submit(prompt, params, request_id=request_id):
            for piece in output.outputs:
                if piece.token_ids:
                    timing.tokens += len(piece.token_ids)
                    timing.moments.append(time.monotonic())
                if piece.error:
                    timing.error = piece.error
    except MidspanError as error:
        timing.error = str(error)
    return timing


def _load_server(
    server: RemoteServer, model: str | None, input_len: int, output_len: int, count: int
) -> dict[str, Any]:
    name = model or server.first_model()
    prompts = random_prompts(count, input_len, COMMON_IDS, seed=None)
    begun = time.monotonic()
    with ThreadPoolExecutor(count) as threads:
        timings = list(threads.map(lambda prompt: _time_remote(server, name, prompt, output_len), prompts))
    summary = summarize(timings, input_tokens=input_len * count, seconds=time.monotonic() - begun)
    return {"model": name, "url": server.url, **summary}


def _time_remote(server: RemoteServer, model: str, prompt: list[int], output_len: int) -> RequestTiming:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    timing = RequestTiming(start=time.monotonic())
    try:
        for chunk in server.stream("/v1/completions", body):
            if chunk.get("choices"):
                timing.moments.append(time.monotonic())
            if chunk.get("usage"):
                timing.tokens = chunk["usage"]["completion_tokens"]
    except MidspanError as error:
        timing.error = str(error)
    return timing


def _text(result: dict[str, Any]) -> str:
    place = result.get("url") or f"{result['device']} as {result['dtype']}"
    lines = [
        f"{result['model']} on {place}",
        f"requests        {result['requests']}, {result['failed']} failed, in {result['seconds']:.2f} s",
        f"tokens          {result['input_tokens']} in, {result['output_tokens']} out",
        f"throughput      {result['requests_per_second']:.2f} requests/s, "
        f"{result['output_tokens_per_second']:.1f} output tokens/s, {result['total_tokens_per_second']:.1f} tokens/s",
    ]
    for title, key in (("first token", "ttft_ms"), ("each next token", "tpot_ms")):
        spread = result[key]
        if spread is not None:
            figures = ", ".join(f"{name} {value:.1f} ms" for name, value in spread.items())
            lines.append(f"{title.ljust(15)} {figures}")
    lines += [f"error: {error}" for error in result["errors"]]
    return "\n".join(lines)
