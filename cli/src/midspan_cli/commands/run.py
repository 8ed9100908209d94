"""``midspan run``: one prompt, one text. Only the text goes to standard output."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from midspan.settings import read_environment
from midspan_cli.engine_flags import EngineFlags
from midspan_cli.sampling_flags import SamplingFlags
from midspan_cli.startup_display import StartupDisplay

DEFAULT_MAX_TOKENS = 128
STANDARD_INPUT = "-"


def run(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file, hub name or pypi:PACKAGE.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it as a question, by the model's chat template.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Continue one prompt and print the text."""
    from midspan.errors import RequestFailed
    from midspan_cli.local_engine import LocalEngine

    if prompt == STANDARD_INPUT:
        prompt = sys.stdin.read()
    sampling.params({}, max_tokens=DEFAULT_MAX_TOKENS)  # a wrong value is said before anything is loaded
    display, results = StartupDisplay(quiet=quiet), sys.stdout
    with (
        redirect_stdout(sys.stderr),
        display,
        LocalEngine(engine.settings(model), read_environment(), display.report) as local,
    ):
        display.close()
        tokenizer = local.engine.tokenizer
        params = sampling.params(local.engine.default_params, max_tokens=DEFAULT_MAX_TOKENS)
        question: str | list[int] = prompt
        if chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            question = tokenizer.encode(text, add_special_tokens=False)
        for output in local.outputs(question, params):
            for piece in output.outputs:
                if piece.finish_reason == "error":
                    raise RequestFailed(f"The request failed while it ran: {piece.error}")
                results.write(piece.text)
            results.flush()
        results.write("\n")
