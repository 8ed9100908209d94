"""What a conversation may look like, and what templates see of it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from midspan.errors import InvalidRequest
from midspan.text.chat_messages import plain_data, plain_messages

USER = {"role": "user", "content": "hello"}


def test_messages_are_copied() -> None:
    given: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"}]
    plain = plain_messages(given, as_parts=None)
    assert plain == given
    plain[0]["content"][0]["text"] = "changed"
    assert given[0]["content"][0]["text"] == "a"


def test_parts_are_joined_for_a_template_that_takes_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_messages([{"role": "user", "content": parts}], as_parts=False)[0]["content"] == "a\nb"


def test_text_becomes_a_part_for_a_template_that_takes_parts() -> None:
    assert plain_messages([USER], as_parts=True)[0]["content"] == [{"type": "text", "text": "hello"}]
    assert plain_messages([USER], as_parts=None)[0]["content"] == "hello"


def test_arguments_of_tool_calls_become_values() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    plain = plain_messages([{"role": "assistant", "tool_calls": [call]}], as_parts=False)
    assert plain[0]["content"] == ""
    assert plain[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_missing_tool_calls_are_no_tool_calls() -> None:
    assert plain_messages([{**USER, "tool_calls": None}], as_parts=False) == [USER]


def test_any_mapping_and_any_kind_of_text_becomes_plain() -> None:
    class Text(str):
        def escape(self) -> str:
            return "no"

    plain = plain_messages((MappingProxyType({"role": Text("user"), "content": Text("x")}),), as_parts=False)
    assert type(plain[0]) is dict
    assert type(plain[0]["content"]) is str


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must be"),
        ("hello", "messages must be"),
        (None, "messages must be"),
        ({"role": "user"}, "messages must be"),
        (["hello"], r"messages\[0\] must be"),
        ([USER, {"content": "x"}], r"messages\[1\].role"),
        ([{"role": "", "content": "x"}], r"messages\[0\].role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"role": "user", "content": None}], r"messages\[0\].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"messages\[0\].content"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url.*text only"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text"),
        ([{"role": "assistant", "content": "", "tool_calls": 3}], "tool_calls must be"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"tool_calls\[0\].function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments is not JSON",
        ),
        ([{"role": "user", "content": "x", "extra": object()}], "extra must be"),
        ([{"role": "user", "content": "x", 3: 4}], "key that is no text"),
    ],
)
def test_another_shape_is_refused_at_its_place(messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        plain_messages(messages, as_parts=False)
    assert caught.value.parameter == "messages"


def test_endless_nesting_is_refused() -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(InvalidRequest, match="nested"):
        plain_data(nested, "tools")
