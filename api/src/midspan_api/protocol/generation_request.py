"""The fields that completions and chat share, and how they become sampling parameters.

Names are OpenAI's and vLLM's. Every field may be null, which means "not given".
Fields that are not listed are ignored, as clients send many that have no effect
on the text (``user``, ``metadata``, ``store``, ``service_tier`` ...). Fields that
would change the text and are not served are listed, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from midspan.decoding.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from midspan.errors import InvalidRequest

DIRECT_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)
"""Request fields that are sampling parameters of the same name."""


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Fields of every request that generates."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: bool | None = None

    def refuse_unserved(self) -> None:
        """Refuse what would change the text and is not served.

        Raises:
            InvalidRequest: names the field.
        """
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise not_supported("response_format", "Only response_format of type text is served.")
        for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if getattr(self, name) is not None:
                raise not_supported(name)
        if self.use_beam_search:
            raise not_supported("use_beam_search")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream=true only.", parameter="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs does not go with stream=true.", parameter="prompt_logprobs")
        if self.cache_salt == "":
            raise InvalidRequest("cache_salt must not be empty.", parameter="cache_salt")

    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of the stream carries the usage so far."""
        options = self.stream_options
        return options is not None and bool(options.include_usage) and bool(options.continuous_usage_stats)


def not_supported(parameter: str, explanation: str = "") -> InvalidRequest:
    """The error for a field that this server understands and does not serve."""
    return InvalidRequest(
        f"{parameter} is not supported yet.",
        remedy=explanation or f"Send the request without {parameter}.",
        parameter=parameter,
        code="unsupported_parameter",
    )


def sampling_params(
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of a request.

    Args:
        request: what the client sent.
        defaults: the model's own, by the names of ``SamplingParams``.
        max_tokens: resolved by the caller, as routes name and default it differently.
        logprobs: likewise.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    fields: dict[str, Any] = dict(defaults)
    for name in DIRECT_FIELDS:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.logit_bias is not None and len(request.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(request.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are taken.",
            parameter="logit_bias",
        )
    if request.logit_bias:
        fields["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    fields["max_tokens"] = max_tokens
    fields["logprobs"] = logprobs
    return SamplingParams(**fields)


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidRequest(
            "The keys of logit_bias must be token ids.", remedy="/tokenize gives them.", parameter="logit_bias"
        )
    return int(key)
