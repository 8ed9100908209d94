"""What a caller may ask of generation, in vLLM's and OpenAI's names.

Knows no tokenizer and no device. Values are checked when the record is made, so
that nothing later meets a NaN or an absurd count; what needs the model (token
ids in the vocabulary, lengths) is checked by ``engine.request_validation``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from midspan.errors import InvalidRequest

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 2**18
"""More than any vocabulary has."""
LEAST_REPETITION_PENALTY = 0.01
"""Logits are divided by it: less of it makes them infinite."""
SHOWN_DIGITS = 30
SHOWN_CHARACTERS = 100
SEED_RANGE = (-(2**63), 2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. Every field has vLLM's default.

    Attributes:
        n: completions for each prompt, 1 to 16.
        temperature: 0 is greedy; at most 100.
        top_p: in (0, 1].
        top_k: 0 or -1: no limit.
        min_p: in [0, 1].
        seed: makes the tokens repeatable; None: the engine draws one.
        max_tokens: tokens to generate at most; None: up to the context's end.
        min_tokens: tokens before which no stop counts.
        presence_penalty, frequency_penalty: in [-2, 2], added per generated token.
        repetition_penalty: 0.01 to 100, over prompt and generated tokens.
        stop: strings that end the text, at most 16.
        stop_token_ids: token ids that end it.
        bad_words: words that are never generated.
        allowed_token_ids: only these may be generated.
        logit_bias: token id -> added to its logit, in [-100, 100].
        ignore_eos: go on after the end-of-sequence token.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: number of top logprobs with each token, 0 to 20; None: none.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: make text, not only ids.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("stop", "stop_token_ids", "bad_words"):
            object.__setattr__(self, name, _list(name, getattr(self, name) or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _list("allowed_token_ids", self.allowed_token_ids))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, f"{name} must be true or false, not {_short(getattr(self, name))}.")
        self._check_numbers()
        self._check_lists()

    def replace(self, **changes: object) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0, not 0.", parameter="top_p", remedy="Use temperature=0.")
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, *SEED_RANGE)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}.")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        _at_most("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _wrong("stop", f"Each stop string must have 1 to {MAX_STOP_LENGTH} characters.")
        _at_most("bad_words", self.bad_words, MAX_BAD_WORDS)
        for text in self.bad_words:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _wrong("bad_words", f"Each bad word must have 1 to {MAX_STOP_LENGTH} characters.")
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise _wrong("allowed_token_ids", "allowed_token_ids must not be empty.")
            _at_most("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0, 2**31 - 1)
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise _wrong("logit_bias", "logit_bias must map token ids to numbers.")
        _at_most("logit_bias", self.logit_bias or {}, MAX_LOGIT_BIAS)
        for token, bias in (self.logit_bias or {}).items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)


def _list(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise _wrong(name, f"{name} must be a list, not {_short(values)}.")
    return tuple(values)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, f"{name} must be an integer, not {_short(value)}.")
    if not low <= value <= high:
        raise _wrong(name, f"{name} must be between {low} and {high}, not {_short(value)}.")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, f"{name} must be a number, not {_short(value)}.")
    if not low <= value <= high:  # also for NaN
        raise _wrong(name, f"{name} must be between {low:g} and {high:g}, not {_short(value)}.")


def _at_most(name: str, values: Sequence[object] | Mapping[int, float], limit: int) -> None:
    if len(values) > limit:
        raise _wrong(name, f"{name} has {len(values)} entries; at most {limit} are taken.")


def _wrong(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, parameter=name, remedy=f"Correct {name}, or leave it out.")


def _short(value: object) -> str:
    """A value for a message; what is absurdly long is cut."""
    if isinstance(value, int) and not -(10**SHOWN_DIGITS) < value < 10**SHOWN_DIGITS:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}[...]"
