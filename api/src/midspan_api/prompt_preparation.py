"""Turns prompts and messages into token ids without holding up the event loop.

Short texts are worked on in place, as a hop to a thread costs more than they
do; long ones go to a small pool of threads of their own. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from midspan.errors import InvalidRequest
from midspan_api.protocol.chat_request import Message, template_messages, template_variables

if TYPE_CHECKING:
    from midspan.text.tokenizer import Tokenizer

Result = TypeVar("Result")

SHORT_CHARACTERS = 2048
"""Texts up to this length are tokenized on the event loop: well below a millisecond."""

THREADS = 2
DECODE_IN_PLACE = 512


class PromptPreparation:
    """Templates and tokenization for one server.

    Args:
        tokenizer: the model's.
        chat_template: template that replaces the model's; None: the model's.
        trust_request_template: let requests bring their own.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat_template: str | None, trust_request_template: bool) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._trust_request_template = trust_request_template
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        work = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._run(work, len(text))

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids.

        Raises:
            InvalidRequest: an id outside the vocabulary.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                raise InvalidRequest(
                    f"The vocabulary has {self._tokenizer.vocab_size} tokens; a token id lies outside of it.",
                    parameter="tokens",
                )
        work = partial(self._tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await self._run(work, SHORT_CHARACTERS * len(token_ids) // DECODE_IN_PLACE)

    async def chat_text(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        template: str | None,
        variables: dict[str, Any] | None,
    ) -> str:
        """The prompt text that the chat template makes of messages.

        Args:
            messages: as the client sent them.
            add_generation_prompt: open the assistant's turn; None: yes, unless the last message is continued.
            continue_final_message: leave the last message open.
            template: the request's own template.
            variables: further variables for the template.

        Raises:
            InvalidRequest: the messages or options do not fit.
            TemplateError: the model has no template, or it failed on these messages.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other.",
                parameter="continue_final_message",
            )
        if template is not None and not self._trust_request_template:
            raise InvalidRequest(
                "This server takes no chat templates from requests.",
                remedy="Start it with --trust-request-chat-template if every client is trusted.",
                parameter="chat_template",
                code="unsupported_parameter",
            )
        prepared = template_messages(messages)
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        work = partial(
            self._tokenizer.apply_chat_template,
            prepared,
            add_generation_prompt=opens,
            continue_final_message=bool(continue_final_message),
            template=template or self._chat_template,
            **template_variables(variables),
        )
        size = SHORT_CHARACTERS + 1 if template is not None else sum(map(_characters, prepared))
        return await self._run(work, size)

    async def _run(self, work: Callable[[], Result], characters: int) -> Result:
        if characters <= SHORT_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _characters(message: Message) -> int:
    return len(message["content"])


def truncated(token_ids: list[int], limit: int | None, longest: int) -> list[int]:
    """The last ``limit`` tokens of a prompt.

    Args:
        token_ids: the prompt.
        limit: tokens to keep; None: all; -1: as many as the model's context holds.
        longest: tokens of the model's context.

    Raises:
        InvalidRequest: the limit is neither -1 nor between 1 and ``longest``.
    """
    if limit is None:
        return token_ids
    if limit != -1 and not 1 <= limit <= longest:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or between 1 and {longest}, not {limit}.",
            parameter="truncate_prompt_tokens",
        )
    return token_ids[-(longest - 1 if limit == -1 else limit) :]
