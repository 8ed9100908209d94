"""Equal beginnings lead to the replica that had them; what cannot be compared leads nowhere."""

from __future__ import annotations

import pytest

from midspan.cluster.prefix_routes import CHUNK_BYTES, CHUNK_TOKENS, MAX_CHUNKS, PrefixRoutes, beginnings

PROMPT = list(range(10 * CHUNK_TOKENS))


def test_the_longest_known_beginning_decides() -> None:
    routes = PrefixRoutes()
    routes.note(beginnings(PROMPT[: 3 * CHUNK_TOKENS], None), 0)
    routes.note(beginnings([*PROMPT[: 5 * CHUNK_TOKENS]], None), 1)
    assert routes.find(beginnings(PROMPT, None)) == 1
    other = [*PROMPT[: 3 * CHUNK_TOKENS], *([7] * 100)]
    assert routes.find(beginnings(other, None)) == 1
    routes.note(beginnings(other, None), 2)
    assert routes.find(beginnings(other, None)) == 2
    assert routes.find(beginnings(PROMPT, None)) == 1


def test_salts_short_prompts_and_other_prompts_lead_nowhere() -> None:
    routes = PrefixRoutes()
    routes.note(beginnings(PROMPT, "one"), 1)
    assert routes.find(beginnings(PROMPT, None)) is None
    assert routes.find(beginnings(PROMPT, "two")) is None
    assert routes.find(beginnings(PROMPT[1:], "one")) is None
    assert routes.find(beginnings(PROMPT[: CHUNK_TOKENS - 1], "one")) is None
    assert routes.find(beginnings(PROMPT, "one")) == 1


def test_text_is_compared_by_its_bytes() -> None:
    text = "zwölf 🎉 " * 30
    routes = PrefixRoutes()
    routes.note(beginnings(text, None), 1)
    assert routes.find(beginnings(text + "and more", None)) == 1
    assert routes.find(beginnings("z" + text, None)) is None
    assert len(beginnings("a" * (CHUNK_BYTES * 3 - 1), None)) == 2


@pytest.mark.parametrize("prompt", ["\ud800" * 100, [-1] * 100, ["the"] * 100, [2**40] * 100, [1.5] * 100])
def test_what_is_no_prompt_has_no_beginning(prompt: object) -> None:
    assert beginnings(prompt, None) == []  # type: ignore[arg-type]


def test_only_so_much_of_a_prompt_is_looked_at_and_so_many_beginnings_are_kept() -> None:
    long = [5] * (2 * MAX_CHUNKS * CHUNK_TOKENS)
    assert len(beginnings(long, None)) == MAX_CHUNKS
    routes = PrefixRoutes(limit=10)
    first, second = beginnings(PROMPT, "first"), beginnings(PROMPT, "second")
    routes.note(first, 0)
    assert routes.find(first) == 0
    routes.note(second, 1)
    assert routes.find(first) is None
    assert routes.find(second) == 1
