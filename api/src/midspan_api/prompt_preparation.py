"""Turns prompts and messages into token ids without holding up the event loop.

Short texts are worked on in place, as a hop to a thread costs more than they
do; long ones go to a small pool of threads of their own. A text that is longer
than any that fits the model is refused unread. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from midspan.errors import ContextLengthExceeded, InvalidRequest
from midspan_api.protocol.chat_request import template_messages, template_variables

if TYPE_CHECKING:
    from midspan.text.tokenizer import Tokenizer

Result = TypeVar("Result")

SHORT_CHARACTERS = 2048
"""Texts up to this length are tokenized on the event loop: well below a millisecond."""

THREADS = 2
DECODE_IN_PLACE = 512
FOLDED_CHARACTERS = 4
"""Characters that a tokenizer may fold into one before it looks for tokens: accents, ligatures, runs of spaces."""

MESSAGE_COST = 64
"""Work on a message or a part of one besides its text, in characters of text."""


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
        self._longest_token: int | None = None

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool, context: int | None = None, parameter: str
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: any texts.
            add_special_tokens: put the tokens around each that the model expects.
            context: tokens that the model takes; None: the length does not matter.
            parameter: the request field that the texts came from, for errors.

        Raises:
            ContextLengthExceeded: a text has too many characters for this context, whatever its tokens.
        """
        work = partial(self._encode_all, texts, add_special_tokens, context, parameter)
        return await self._run(work, sum(map(len, texts)))

    def _encode_all(
        self, texts: Sequence[str], add_special_tokens: bool, context: int | None, parameter: str
    ) -> list[list[int]]:
        if context is not None:
            for text in texts:
                self._check_length(text, context, parameter)
        return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def _check_length(self, text: str, context: int, parameter: str) -> None:
        if len(text) <= context * FOLDED_CHARACTERS:
            return
        if self._longest_token is None:
            self._longest_token = self._tokenizer.longest_token() or len(text)
        least = len(text) // (self._longest_token * FOLDED_CHARACTERS)
        if least >= context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, the prompt has at least {least} "
                "tokens, which leaves no room for output.",
                parameter=parameter,
                remedy="Shorten the prompt.",
            )

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool, parameter: str = "tokens") -> str:
        """The text of token ids.

        Raises:
            InvalidRequest: an id outside the vocabulary.
        """
        for token_id in token_ids:
            if not 0 <= token_id < self._tokenizer.vocab_size:
                raise InvalidRequest(
                    f"The vocabulary has {self._tokenizer.vocab_size} tokens; a token id lies outside of it.",
                    parameter=parameter,
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
        opens = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        given = template_variables(variables)

        def render() -> str:
            return self._tokenizer.apply_chat_template(
                template_messages(messages),
                add_generation_prompt=opens,
                continue_final_message=bool(continue_final_message),
                template=template or self._chat_template,
                **given,
            )

        size = SHORT_CHARACTERS + 1 if template is not None else sum(map(_characters, messages))
        return await self._run(render, size)

    async def _run(self, work: Callable[[], Result], characters: int) -> Result:
        if characters <= SHORT_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _characters(message: dict[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, list):
        return sum(MESSAGE_COST + _length(part.get("text")) for part in content if isinstance(part, dict))
    return MESSAGE_COST + _length(content)


def _length(text: object) -> int:
    return len(text) if isinstance(text, str) else 0


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
