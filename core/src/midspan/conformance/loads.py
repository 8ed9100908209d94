"""Requests that bring an engine into each of its situations.

Arithmetic over lengths and block sizes; knows no device. Prompts are random, and no two begin alike
unless they are meant to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from midspan.conformance.engine_drive import LoadRequest

OUTPUTS = 12
LENGTHS = (9, 1, 33, 3, 20, 50, 16, 2)
"""Of prompts: shorter and longer than blocks and windows, and one token."""


def tokens(count: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    """Random token ids from 1 on; id 0 is nobody's, so that a check may poison it."""
    return tuple(int(token) for token in np.random.default_rng([seed, count]).integers(1, vocab_size, count))


def simple(vocab_size: int, context: int, *, count: int = len(LENGTHS), outputs: int = OUTPUTS) -> list[LoadRequest]:
    """Greedy requests of different lengths.

    Args:
        vocab_size: ids are below it.
        context: tokens of a request at most.
        count: requests.
        outputs: tokens that each generates, fewer where the context is short.
    """
    outputs = max(1, min(outputs, context - 1))
    return [
        LoadRequest(
            prompt=tokens(max(1, min(LENGTHS[number % len(LENGTHS)], context - outputs)), number, vocab_size),
            outputs=outputs,
        )
        for number in range(count)
    ]


def arriving(requests: Sequence[LoadRequest], every: int) -> list[LoadRequest]:
    """The same requests, one every so many steps."""
    return [replace(request, enters=number * every) for number, request in enumerate(requests)]


def long_prompts(vocab_size: int, context: int, length: int) -> list[LoadRequest]:
    """Two prompts that take several steps, and short requests beside them."""
    outputs = max(1, min(OUTPUTS, context // 4))
    length = max(1, min(length, context - outputs))
    long = [
        LoadRequest(prompt=tokens(length - part, 50 + part, vocab_size), outputs=outputs)
        for part in range(2)
        if length > part
    ]
    return [*simple(vocab_size, context, count=2), *long]


def shared_prefix(vocab_size: int, block_size: int) -> list[LoadRequest]:
    """Requests whose prompts begin with the same full block and end apart; the first is over before the others."""
    prefix = tokens(block_size, 70, vocab_size)
    return [
        LoadRequest(prompt=(*prefix, *tokens(1 + 2 * number, 71 + number, vocab_size)), outputs=4, enters=10 * number)
        for number in range(3)
    ]


def crowding(vocab_size: int, block_size: int) -> tuple[list[LoadRequest], int]:
    """Requests that all begin, and then cannot all go on.

    Returns:
        They, and the tokens that the cache must hold for that: two prompts, and one request whole.
    """
    length, outputs = max(block_size - 2, 5), 10
    requests = [LoadRequest(prompt=tokens(length, 80 + number, vocab_size), outputs=outputs) for number in range(3)]
    prompt_blocks, whole_blocks = (-(-count // block_size) for count in (length, length + outputs))
    return requests, block_size * max(2 * prompt_blocks, whole_blocks)


def sampled(vocab_size: int, context: int, num_logprobs: int | None) -> list[LoadRequest]:
    """Requests with several sequences each, drawn at random, beside greedy ones."""
    plain = simple(vocab_size, context, count=4)
    return [
        replace(request, temperature=temperature, seed=1000 + number, n=n, logprobs=num_logprobs)
        for number, (request, temperature, n) in enumerate(zip(plain, (0.8, 1.0, 1.3, 0.0), (3, 1, 2, 1), strict=True))
    ]


def scored(vocab_size: int, context: int, num_logprobs: int) -> list[LoadRequest]:
    """Requests whose tokens, prompts included, come with logprobs."""
    wanted = (num_logprobs, 0, None, num_logprobs)
    return [
        replace(request, logprobs=count, prompt_logprobs=count)
        for request, count in zip(simple(vocab_size, context, count=4), wanted, strict=True)
    ]
