"""``midspan serve``: a model behind the OpenAI API."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from midspan.errors import MidspanError, SettingsError
from midspan.settings import DEFAULT_MODEL, Environment, read_environment
from midspan_cli.engine_flags import MODEL, EngineFlags
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan.engine.engine_process import EngineProcess
    from midspan.settings import EngineSettings
    from midspan_api.server import Ready
    from midspan_api.server_settings import ServerSettings

SERVER = "Server"
SECURITY = "Security"
OBSERVATION = "Observation"

MEBIBYTE = 2**20
EXAMPLE_QUESTION = "What is the capital of France?"


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Flags of the server itself."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER)] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port.", rich_help_panel=SERVER)] = 8000
    served_model_name: Annotated[
        list[str], typer.Option(help="Name that requests may give; several are possible.", rich_help_panel=SERVER)
    ] = field(default_factory=list)
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get after SIGTERM.", rich_help_panel=SERVER)
    ] = 30.0
    root_path: Annotated[str, typer.Option(help="Path prefix of a proxy in front.", rich_help_panel=SERVER)] = ""
    max_body_size: Annotated[int, typer.Option(min=1, help="Largest request body in MiB.", rich_help_panel=SERVER)] = 32
    chat_template: Annotated[
        str | None, typer.Option(help="A file with a chat template, or its text.", rich_help_panel=MODEL)
    ] = None
    api_key: Annotated[
        list[str],
        typer.Option(help="Key that requests must bring; several are possible.", rich_help_panel=SECURITY),
    ] = field(default_factory=list)
    trust_request_chat_template: Annotated[
        bool,
        typer.Option(
            "--trust-request-chat-template", help="Let requests bring chat templates.", rich_help_panel=SECURITY
        ),
    ] = False
    ssl_keyfile: Annotated[str | None, typer.Option(help="PEM file of the TLS key.", rich_help_panel=SECURITY)] = None
    ssl_certfile: Annotated[
        str | None, typer.Option(help="PEM file of the TLS certificate.", rich_help_panel=SECURITY)
    ] = None
    log_format: Annotated[str, typer.Option(help="text or json.", rich_help_panel=OBSERVATION)] = "text"
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.", rich_help_panel=OBSERVATION)] = "info"
    metrics_compat: Annotated[
        str, typer.Option(help="Second set of metric names: vllm or none.", rich_help_panel=OBSERVATION)
    ] = "vllm"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help=f"Folder, .gguf file, hub name or pypi:PACKAGE. Default: {DEFAULT_MODEL}"),
    ] = None,
    *,
    server: ServerFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model with the OpenAI API."""
    from midspan.engine.engine_process import start_engine_process

    environment = read_environment()
    if model is None:
        model = DEFAULT_MODEL
        typer.echo(f"No model was named; taking {model}.", err=True)
    engine_settings = engine.replica_settings(model, served_model_name=server.served_model_name)
    processes: list[EngineProcess] = []
    try:
        # They open their devices while this process loads the server: together they take half as long.
        for settings in engine_settings:
            processes.append(start_engine_process(settings))
        status = _run(server, engine_settings, environment, processes)
    finally:
        for process in processes:
            process.abandon()
    raise typer.Exit(status)


def _run(
    server: ServerFlags,
    engine_settings: Sequence[EngineSettings],
    environment: Environment,
    processes: Sequence[EngineProcess],
) -> int:
    run_server = _server_package()
    from midspan.observation.logging import configure_logging

    configure_logging(style=server.log_format, level=server.log_level)
    server_settings = server_settings_of(server, environment)
    _warn_if_open(server_settings)
    with StartupDisplay() as display:
        return run_server(
            engine_settings,
            server_settings,
            environment=environment,
            report=display.report,
            ready=lambda ready: _announce(display, ready, guarded=bool(server_settings.api_keys)),
            processes=processes,
        )


def server_settings_of(flags: ServerFlags, environment: Environment) -> ServerSettings:
    """The server's settings; a key from the environment counts when no flag gives one.

    Raises:
        SettingsError: a value cannot work.
    """
    from midspan_api import ServerSettings

    if flags.metrics_compat not in ("vllm", "none"):
        raise SettingsError(f"--metrics-compat {flags.metrics_compat!r} is not known.", remedy="Take vllm or none.")
    keys = tuple(flags.api_key) or ((environment.api_key,) if environment.api_key else ())
    return ServerSettings(
        host=flags.host,
        port=flags.port,
        api_keys=keys,
        served_model_names=tuple(flags.served_model_name),
        chat_template=_template_text(flags.chat_template),
        trust_request_chat_template=flags.trust_request_chat_template,
        max_body_bytes=flags.max_body_size * MEBIBYTE,
        shutdown_timeout=flags.shutdown_timeout,
        vllm_metric_names=flags.metrics_compat == "vllm",
        root_path=flags.root_path,
        ssl_keyfile=flags.ssl_keyfile,
        ssl_certfile=flags.ssl_certfile,
    )


def _server_package() -> Callable[..., int]:
    try:
        from midspan_api import run_server
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(("midspan_api", "fastapi", "uvicorn", "starlette")):
            raise
        raise MidspanError("The server is not installed.", remedy="Install it: pip install midspan-api") from error
    return run_server


def _template_text(given: str | None) -> str | None:
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The chat template {given!r} cannot be read: {error}.", remedy="Give a file, or the template's text."
        ) from None


def _warn_if_open(settings: ServerSettings) -> None:
    from midspan_api.listening import is_loopback

    if not is_loopback(settings.host) and not settings.api_keys:
        typer.secho(
            f"Warning: everybody who reaches {settings.host}:{settings.port} can use this server. "
            "Guard it with --api-key.",
            fg="yellow",
            err=True,
        )


def _announce(display: StartupDisplay, ready: Ready, *, guarded: bool) -> None:
    display.close()
    places = [f"{model.device} ({model.device_description}), {model.dtype}" for model in ready.replicas]
    typer.echo(
        f"{ready.model_name} is ready after {ready.seconds:.1f} s on {' and '.join(places)}, "
        f"up to {ready.model.max_model_len} tokens a request."
    )
    typer.secho(ready.url, bold=True)
    typer.echo("Try it:")
    typer.echo(curl_line(ready.url, ready.model_name, chat=ready.has_chat_template, guarded=guarded))


def curl_line(url: str, model_name: str, *, chat: bool, guarded: bool) -> str:
    """A command that asks the server something; works when pasted into a shell."""
    if chat:
        path = "/v1/chat/completions"
        messages = [{"role": "user", "content": EXAMPLE_QUESTION}]
        body: dict[str, Any] = {"model": model_name, "messages": messages, "temperature": 0}
    else:
        path = "/v1/completions"
        body = {"model": model_name, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    words = ["curl", url + path, "-H", "Content-Type: application/json"]
    if guarded:
        words += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join([*words, "-d", json.dumps(body)])
