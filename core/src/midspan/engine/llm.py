"""The engine as a script uses it: a list of prompts in, a list of outputs out.

Runs the step loop in the caller's own process and thread. Knows no server and no
other process.

Invariants: outputs come in the order of the prompts; a bad prompt is refused before
anything runs; whatever interrupts a call leaves no request behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Union, cast

from midspan.decoding.sampling_params import SamplingParams
from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.keyword_settings import settings_from_keywords
from midspan.engine.loading import load_model
from midspan.engine.messages import AddRequest, SequenceEvent, SequenceStart
from midspan.engine.model_location import locate_model
from midspan.engine.model_text import load_model_text
from midspan.engine.output_processing import OutputProcessor, merge
from midspan.engine.outputs import RequestOutput
from midspan.engine.progress import ProgressLine
from midspan.engine.request_seeds import request_seed, sequence_seed
from midspan.engine.request_validation import PreparedRequest, prepare_request
from midspan.engine.status import EngineStatistics, ModelInfo, Report, ignore_phase
from midspan.engine.step_loop import EngineCore
from midspan.errors import EngineDead, InvalidRequest
from midspan.settings import Environment, read_environment
from midspan.text.tokenizer import Tokenizer

Prompt = Union[str, Sequence[int], Mapping[str, Any]]
"""Text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``."""

Message = Mapping[str, Any]
"""One chat message: ``{"role": ..., "content": ...}``."""


class LLM:
    """A model for offline use.

    Attributes:
        model: what was loaded, and on what.
    """

    def __init__(
        self,
        model: str,
        *,
        environment: Environment | None = None,
        catalogue: DeviceCatalogue | None = None,
        report: Report = ignore_phase,
        **settings: Any,
    ) -> None:
        """Load a model.

        Args:
            model: folder, ``.gguf`` file, hub name or ``pypi:PACKAGE``.
            environment: where models are kept; None: as the process environment says.
            catalogue: the devices to choose from; None: those installed.
            report: gets each phase of the loading.
            settings: fields of ``EngineSettings``; vLLM's names work.

        Raises:
            SettingsError: an unknown setting, or a value that cannot work.
            MidspanError: whatever kept the model from being loaded, see ``engine.loading``.
        """
        self._settings = settings_from_keywords(model, settings)
        path: Path = locate_model(self._settings, environment or read_environment(), report=report)
        self._text = load_model_text(self._settings, path)
        self._core: EngineCore | None = EngineCore(
            load_model(self._settings, path, catalogue=catalogue, report=report), self._settings
        )
        self.model: ModelInfo = self._core.model
        self._requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: one or many.
            sampling_params: for all, or one for each; None: the model's defaults.
            use_tqdm: show progress on a terminal.

        Returns:
            One output for each prompt, in their order. One that failed while it ran has the
            finish reason ``"error"``.

        Raises:
            InvalidRequest: a prompt can never succeed; nothing was run.
        """
        return self._complete([_unpack(prompt) for prompt in _listed(prompts)], sampling_params, True, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Args:
            messages: one conversation or many.
            sampling_params: for all, or one for each; None: the model's defaults.
            use_tqdm: show progress on a terminal.
            chat_template: instead of the model's own.
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: go on with the last message instead.
            tools: descriptions of tools, for templates that take them.
            chat_template_kwargs: more variables for the template.

        Returns:
            As ``generate``.

        Raises:
            TemplateError: the template is missing or fails on these messages.
            InvalidRequest: as ``generate``.
        """
        conversations = _conversations(messages)
        prompts: list[str | Sequence[int]] = [
            self._text.tokenizer.apply_chat_template(
                [dict(message) for message in conversation],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=None if tools is None else [dict(tool) for tool in tools],
                template=chat_template,
                **dict(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self._complete(prompts, sampling_params, False, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults that the model's generation config asks for."""
        return SamplingParams(**self._text.default_params)

    def statistics(self) -> EngineStatistics:
        """Counters and gauges of the engine."""
        return self._engine().statistics()

    def close(self) -> None:
        """Release the device. May be called again."""
        if self._core is not None:
            self._core.close()
            self._core = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _engine(self) -> EngineCore:
        if self._core is None:
            raise EngineDead("This LLM was closed.", remedy="Make a new one.")
        return self._core

    def _complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        core = self._engine()
        prepared = [
            prepare_request(
                prompt,
                params,
                tokenizer=self._text.tokenizer,
                model=core.model,
                add_special_tokens=add_special_tokens,
            )
            for prompt, params in zip(prompts, self._params(sampling_params, len(prompts)), strict=True)
        ]
        processors: dict[str, OutputProcessor] = {}
        try:
            for one in prepared:
                request = self._request(one)
                processors[request.request_id] = OutputProcessor(
                    request.request_id, one, self._text.tokenizer, arrival_time=request.arrival_time
                )
                core.add(request)
            return _run(core, processors, ProgressLine(len(prepared), enabled=use_tqdm))
        finally:
            for request_id in processors:
                core.abort(request_id)

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or not all(isinstance(one, SamplingParams) for one in given):
            raise InvalidRequest(
                f"sampling_params must be SamplingParams or a list of them, not {type(given).__name__}.",
                parameter="sampling_params",
                remedy="Make them with SamplingParams(temperature=0, ...).",
            )
        if len(given) != count:
            raise InvalidRequest(
                f"There are {count} prompts and {len(given)} sampling parameters.",
                parameter="sampling_params",
                remedy="Give one for all, or one for each.",
            )
        return given

    def _request(self, prepared: PreparedRequest) -> AddRequest:
        number, self._requests = self._requests, self._requests + 1
        params = prepared.params
        seed = params.seed if params.seed is not None else request_seed(self._settings.seed, number)
        return AddRequest(
            request_id=str(number),
            prompt_ids=prepared.prompt_ids,
            params=params,
            sequences=[SequenceStart(index=index, seed=sequence_seed(seed, index)) for index in range(params.n)],
            eos_token_ids=self._text.eos_token_ids,
            bad_word_ids=prepared.bad_word_ids,
            arrival_time=time.monotonic(),
        )


def _run(core: EngineCore, processors: Mapping[str, OutputProcessor], progress: ProgressLine) -> list[RequestOutput]:
    """Step until all are finished; outputs in the order of the processors."""
    outputs: dict[str, RequestOutput] = {}
    done = tokens = 0
    events = core.take_events()
    while True:
        for request_id, news in _by_request(events).items():
            step = processors[request_id].process(news, time.monotonic())
            for index in step.stopped:
                core.abort(request_id, index, reason="stop")
            if step.output is not None:
                outputs[request_id] = merge(outputs.get(request_id), step.output)
                done += step.output.finished
                tokens += sum(len(piece.token_ids) for piece in step.output.outputs)
        progress.show(done, tokens)
        if not core.has_work():
            progress.close()
            return [outputs[request_id] for request_id in processors]
        events = core.step().sequences


def _by_request(events: Sequence[SequenceEvent]) -> dict[str, list[SequenceEvent]]:
    found: dict[str, list[SequenceEvent]] = {}
    for event in events:
        found.setdefault(event.request_id, []).append(event)
    return found


def _conversations(messages: object) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise _no_messages(messages)
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or not all(isinstance(message, Mapping) for message in conversation):
            raise _no_messages(conversation)
    return conversations


def _no_messages(given: object) -> InvalidRequest:
    return InvalidRequest(
        f"A conversation must be a list of messages, not {type(given).__name__}.",
        parameter="messages",
        remedy='Give [{"role": "user", "content": "..."}], or a list of such lists.',
    )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise InvalidRequest(
            f"Prompts must be text, token ids or a list of such, not {type(prompts).__name__}.",
            parameter="prompt",
            remedy="Give text or token ids.",
        )
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [cast("list[int]", listed)]
    return cast("list[Prompt]", listed)


def _unpack(prompt: Prompt) -> str | Sequence[int]:
    if isinstance(prompt, Mapping):
        for name in ("prompt_token_ids", "prompt"):
            if name in prompt:
                return cast("str | Sequence[int]", prompt[name])
        raise InvalidRequest(
            "A prompt given as a mapping needs 'prompt' or 'prompt_token_ids'.",
            parameter="prompt",
            remedy="Give text or token ids.",
        )
    return prompt
