"""Turns what a caller asked into a request that the engine can run, or refuses it.

Checks all that needs the model: ids in its vocabulary, lengths in its context,
text that can be encoded. Values on their own were checked by ``SamplingParams``.
Knows no engine state; the same call is made by the offline ``LLM`` and the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from midspan.decoding.bad_words import bad_word_ids
from midspan.decoding.sampling_params import SamplingParams
from midspan.engine.status import ModelInfo
from midspan.errors import ContextLengthExceeded, InvalidRequest
from midspan.text.tokenizer import Tokenizer

LARGEST_PRIORITY = 2**31 - 1
LARGEST_SHOWN = 10**18
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request that was found good.

    Attributes:
        prompt: its text, or None when it came as ids.
        prompt_ids: what will be run.
        params: with ``max_tokens`` a number that fits the context.
        bad_word_ids: token sequences that must not appear.
    """

    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    bad_word_ids: tuple[tuple[int, ...], ...]


def prepare_request(
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    model: ModelInfo,
    add_special_tokens: bool = True,
) -> PreparedRequest:
    """Check a request and complete it.

    Args:
        prompt: text or token ids.
        params: how to generate.
        tokenizer: the model's.
        model: its limits.
        add_special_tokens: whether the tokenizer adds its own to a text; a rendered chat has them.

    Raises:
        InvalidRequest: it can never succeed as it is.
        ContextLengthExceeded: the prompt leaves no room for output.
    """
    if isinstance(prompt, str):
        check_text(prompt, "prompt")
        if not prompt:
            raise InvalidRequest("The prompt is empty.", parameter="prompt", remedy="Give text or token ids.")
        text, ids = prompt, tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray)):
        text, ids = None, list(prompt)
        check_token_ids(ids, model.vocab_size, "prompt")
    else:
        raise InvalidRequest(
            f"A prompt must be text or a list of token ids, not {type(prompt).__name__}.",
            parameter="prompt",
            remedy="Give text or token ids.",
        )
    if not ids:
        raise InvalidRequest("The prompt has no tokens.", parameter="prompt", remedy="Give text or token ids.")
    _check_params(params, model)
    return PreparedRequest(
        prompt=text,
        prompt_ids=ids,
        params=_fit(params, len(ids), model.max_model_len),
        bad_word_ids=bad_word_ids(partial(tokenizer.encode, add_special_tokens=False), params.bad_words),
    )


def check_priority(priority: int) -> None:
    """Refuse a priority that does not fit a message to the engine.

    Raises:
        InvalidRequest: it is beyond ``LARGEST_PRIORITY`` either way.
    """
    if not -LARGEST_PRIORITY <= priority <= LARGEST_PRIORITY:
        raise InvalidRequest(
            f"priority must be between -{LARGEST_PRIORITY} and {LARGEST_PRIORITY}.",
            parameter="priority",
            remedy="Small numbers will do: only their order matters.",
        )


def check_text(text: str, parameter: str) -> None:
    """Refuse text that is no Unicode: half of a surrogate pair stands for no character.

    Raises:
        InvalidRequest: it holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text of {parameter} holds a lone surrogate at character {error.start}.",
            parameter=parameter,
            remedy="Send valid Unicode.",
        ) from error


def check_token_ids(ids: Iterable[object], vocab_size: int, parameter: str) -> None:
    """Refuse what is no id of the vocabulary.

    Raises:
        InvalidRequest: an entry is no integer, negative or too large.
    """
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InvalidRequest(
                f"{parameter} holds {_shown(token)}, which is no token id.",
                parameter=parameter,
                remedy=f"Token ids are integers from 0 to {vocab_size - 1}.",
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{parameter} holds the token id {_shown(token)}, which is out of the vocabulary of {vocab_size}.",
                parameter=parameter,
                remedy=f"Token ids are 0 to {vocab_size - 1}.",
            )


def _shown(value: object) -> str:
    if isinstance(value, int) and not -LARGEST_SHOWN < value < LARGEST_SHOWN:
        return f"of {value.bit_length()} bits"
    return repr(value)[:SHOWN_CHARACTERS]


def _check_params(params: SamplingParams, model: ModelInfo) -> None:
    check_token_ids(params.stop_token_ids, model.vocab_size, "stop_token_ids")
    check_token_ids(params.allowed_token_ids or (), model.vocab_size, "allowed_token_ids")
    check_token_ids(params.logit_bias or (), model.vocab_size, "logit_bias")
    for text in params.stop:
        check_text(text, "stop")
    for text in params.bad_words:
        check_text(text, "bad_words")
    if params.stop and not params.detokenize:
        raise InvalidRequest(
            "Stop strings need text, but detokenize is off.", parameter="stop", remedy="Use stop_token_ids."
        )
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and wanted > min(model.max_logprobs, model.vocab_size):
            raise InvalidRequest(
                f"{name} is {wanted}; this model on this device gives at most "
                f"{min(model.max_logprobs, model.vocab_size)}.",
                parameter=name,
                remedy="Ask for fewer.",
            )


def _fit(params: SamplingParams, prompt_length: int, context: int) -> SamplingParams:
    room = context - prompt_length
    if room < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, the prompt has {prompt_length} "
            "tokens, which leaves no room for output.",
            parameter="prompt",
            remedy="Shorten the prompt.",
        )
    if params.min_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, the prompt has {prompt_length} "
            f"tokens and min_tokens asks for {params.min_tokens} more.",
            parameter="min_tokens",
            remedy="Shorten the prompt or lower min_tokens.",
        )
    limit = room if params.max_tokens is None else min(params.max_tokens, room)
    return params if limit == params.max_tokens else params.replace(max_tokens=limit)
