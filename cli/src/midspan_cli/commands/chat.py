"""``midspan chat``: a conversation at the terminal, with a model here or a running server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from midspan.errors import MidspanError, RequestFailed
from midspan.settings import DEFAULT_MODEL, read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.sampling_flags import DIRECT_FIELDS, SamplingFlags
from midspan_cli.startup_display import StartupDisplay

if TYPE_CHECKING:
    from midspan_cli.local_engine import LocalEngine
    from midspan_cli.remote_server import RemoteServer

Message = dict[str, str]


class Partner(Protocol):
    """Whoever answers."""

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The answer to a conversation, in pieces."""
        ...


def chat(
    model: Annotated[
        str | None, typer.Argument(help=f"Folder, .gguf file, hub name or pypi:PACKAGE. Default: {DEFAULT_MODEL}")
    ] = None,
    *,
    url: Annotated[str | None, typer.Option(help="Talk to the server at this address instead.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key for that server.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Talk to a model, or to a running server."""
    environment = read_environment()
    if url is not None:
        from midspan_cli.remote_server import RemoteServer

        server = RemoteServer(url=url, api_key=api_key or environment.api_key)
        _converse(_Remote(server, model or server.first_model(), sampling), system)
        return
    from midspan_cli.local_engine import LocalEngine

    sampling.params({}, max_tokens=None)  # a wrong value is said before anything is loaded
    display = StartupDisplay()
    with display, LocalEngine(engine.settings(model or DEFAULT_MODEL), environment, display.report) as local:
        display.close()
        _converse(_Local(local, sampling), system)


def _converse(partner: Partner, system: str | None) -> None:
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        typer.echo("Ctrl-C stops an answer, /clear begins anew, Ctrl-D ends.", err=True)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return
        if not said.strip():
            continue
        if said.strip() == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _print_answer(partner, messages)
        except MidspanError as error:
            typer.secho(f"Error: {error}", fg="red", err=True)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _print_answer(partner: Partner, messages: list[Message]) -> str:
    pieces: list[str] = []
    try:
        for piece in partner.answer(messages):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(" [stopped]", err=True)
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(pieces)


class _Local:
    def __init__(self, local: LocalEngine, sampling: SamplingFlags) -> None:
        self._local = local
        self._params = sampling.params(local.engine.default_params, max_tokens=None)

    def answer(self, messages: list[Message]) -> Iterator[str]:
        tokenizer = self._local.engine.tokenizer
        text = tokenizer.apply_chat_template(messages)
        for output in self._local.outputs(tokenizer.encode(text, add_special_tokens=False), self._params):
            for piece in output.outputs:
                if piece.finish_reason == "error":
                    raise RequestFailed(f"The answer failed: {piece.error}")
                yield piece.text


class _Remote:
    def __init__(self, server: RemoteServer, model: str, sampling: SamplingFlags) -> None:
        self._server = server
        self._body: dict[str, Any] = {"model": model, "stop": sampling.stop or None, "max_tokens": sampling.max_tokens}
        self._body |= {name: getattr(sampling, name) for name in DIRECT_FIELDS}

    def answer(self, messages: list[Message]) -> Iterator[str]:
        given = {key: value for key, value in self._body.items() if value is not None}
        for chunk in self._server.stream("/v1/chat/completions", {**given, "messages": messages}):
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""
