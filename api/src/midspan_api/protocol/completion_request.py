"""A request to ``/v1/completions``.

Knows neither tokenizer nor engine; says what the prompt is and what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

import msgspec

from midspan.decoding.sampling_params import SamplingParams
from midspan.errors import InvalidRequest
from midspan_api.protocol.generation_request import GenerationRequest, not_supported, sampling_params

DEFAULT_MAX_TOKENS = 16

Prompt = Union[str, list[int]]


class CompletionRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def refuse_unserved(self) -> None:
        """As for every request, and ``suffix`` and ``best_of``."""
        super().refuse_unserved()
        if self.suffix:
            raise not_supported("suffix")
        if self.best_of is not None and self.best_of != 1:
            raise not_supported("best_of", "Send n for several completions.")

    def prompts(self, limit: int) -> list[Prompt]:
        """The prompts, one for each completion wanted: texts or lists of token ids.

        Raises:
            InvalidRequest: the list is empty, too long, or mixes kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt must not be empty.", parameter="prompt", code="empty_prompt")
        kinds = {type(item) for item in self.prompt}
        if len(kinds) > 1:
            raise InvalidRequest(
                "prompt mixes texts and token ids; send all of one kind.", parameter="prompt", code="invalid_type"
            )
        if kinds == {int}:
            return [[item for item in self.prompt if isinstance(item, int)]]
        if len(self.prompt) > limit:
            raise InvalidRequest(
                f"prompt holds {len(self.prompt)} prompts; at most {limit} are taken at once.", parameter="prompt"
            )
        return [item for item in self.prompt if not isinstance(item, int)]

    def only_scores(self) -> bool:
        """Whether only the prompt is wanted back: ``echo`` with ``max_tokens`` 0."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters; ``echo`` with ``logprobs`` scores the prompt as well.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.only_scores():
            max_tokens = 1
        params = sampling_params(self, defaults, max_tokens=max_tokens, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None:
            params = params.replace(prompt_logprobs=max(self.logprobs, params.prompt_logprobs or 0))
        return params


class DetokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None
