"""Chat templates: what they can use, what they cannot reach, and what they say when they fail."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from midspan.errors import InvalidRequest, TemplateError
from midspan.text.chat_template import ChatTemplate
from midspan.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "Well, "}


def render(source: str, messages: Any = (USER,), **options: Any) -> str:
    return ChatTemplate(source, now=lambda: datetime(2024, 7, 26)).render(
        list(messages), special_tokens={"bos_token": "<s>"}, **options
    )


def test_messages_are_written_out_and_the_answer_is_begun() -> None:
    assert render(CHATML) == "<|user|>hello<|end|>\n<|assistant|>"
    assert render(CHATML, add_generation_prompt=False) == "<|user|>hello<|end|>\n"


def test_blocks_leave_no_white_space_of_their_own() -> None:
    assert render("{% if true %}\n    {% if true %}\nx\n    {% endif %}\n{% endif %}\ny") == "x\ny"


def test_special_tokens_and_variables_are_there() -> None:
    assert render("{{ bos_token }}{{ mood }}", variables={"mood": "gay"}) == "<s>gay"
    assert render("{{ documents is none }}{{ tools is none }}") == "TrueTrue"
    assert render("{{ documents[0].text }}", variables={"documents": [{"text": "d"}]}) == "d"


def test_tools_are_there_as_json_that_leaves_characters_alone() -> None:
    tool = {"type": "function", "function": {"name": "straße", "description": "<a> & 'b'"}}
    assert render("{{ tools[0].function | tojson }}", tools=[tool]) == (
        """{"name": "straße", "description": "<a> & 'b'"}"""
    )
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": [\n  2\n ],\n "b": 1\n}'


def test_loops_can_be_left_and_dates_written() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


def test_state_can_be_kept_in_a_namespace() -> None:
    source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    assert render(source, [USER, ANSWER, USER]) == "3"


def test_generation_blocks_are_transparent() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahellob"


def test_a_message_can_be_continued() -> None:
    text = render(CHATML, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True)
    assert text == "<|user|>hello<|end|>\n<|assistant|>Well, "


def test_a_message_that_the_template_strips_is_continued_where_it_ends() -> None:
    source = "{% for message in messages %}[{{ message.content | trim }}]{% endfor %}"
    assert render(source, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True) == "[hello][Well,"


def test_a_text_part_can_be_continued() -> None:
    source = "{% for part in messages[0].content %}{{ part.text }};{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "assistant", "content": parts}
    assert render(source, [message], add_generation_prompt=False, continue_final_message=True) == "a;b"


def test_a_message_that_is_not_written_out_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="cannot be continued"):
        render("{{ messages[0].role }}", add_generation_prompt=False, continue_final_message=True)


def test_beginning_an_answer_and_continuing_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="exclude"):
        render(CHATML, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ messages[0].content }}", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ("{% for part in messages[0]['content'] %}<{{ part.text }}>{% endfor %}", "hello", "<hello>"),
        (
            "{% set content = messages[0].content %}{% if content is string %}{{ content }}{% else %}"
            "{% for part in content %}<{{ part.text }}>{% endfor %}{% endif %}",
            "hello",
            "hello",
        ),
        (
            "{% set body = messages[0].content | list %}{% for part in body %}<{{ part['text'] }}>{% endfor %}",
            "hello",
            "<hello>",
        ),
    ],
)
def test_content_comes_in_the_shape_that_the_template_takes(source: str, content: Any, expected: str) -> None:
    assert render(source, [{"role": "user", "content": content}]) == expected


def test_a_templates_own_refusal_is_the_message() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('System message first!') }}{% endif %}"
    with pytest.raises(TemplateError, match="System message first!") as caught:
        render(source)
    assert isinstance(caught.value, InvalidRequest)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ messages[0].content + 3 }}", "{{ missing.name }}", "{{ [][9].x }}"]
)
def test_a_failing_template_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(TemplateError, match="failed"):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nonsense %}", "{{ x | no_such_filter }}"])
def test_a_template_that_is_no_jinja_is_said_at_once(source: str) -> None:
    with pytest.raises(TemplateError, match="not valid"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ strftime_now.__closure__[0].cell_contents }}",
        "{{ dict.mro() }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('{0.__class__' + '.__mro__}').format(messages) }}",
        "{{ messages | map(attribute='__class__') | list | first }}{{ messages.no.such }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include 'file' %}",
        "{% import 'os' as os %}",
        "{{ range(10000000) | list | length }}",
        "{% macro m() %}{{ m.__globals__ }}{% endmacro %}{{ m() }}{{ m._func.__globals__.x }}",
    ],
)
def test_a_template_reaches_nothing_but_its_values(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set big = namespace(n=2) %}{% for i in range(60) %}{% set big.n = big.n * big.n %}{% endfor %}{{ big.n }}",
    ],
)
def test_a_template_cannot_take_all_memory_with_one_product(source: str) -> None:
    with pytest.raises(TemplateError, match="too large"):
        ChatTemplate(source).render([USER], special_tokens={})


def test_products_that_templates_have_use_for_are_made() -> None:
    assert ChatTemplate("{{ '-' * 3 }}{{ 2 ** 10 * 3 }}{{ 1.5 * 2 }}").render([USER], special_tokens={}) == "---30723.0"


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(TemplateError, match="no text but a int"):
        ChatTemplate(5)  # type: ignore[arg-type]


def test_an_attribute_of_the_interpreter_looks_undefined() -> None:
    assert render("{{ messages.__class__ is defined }}{{ messages[0].content.__len__ is defined }}") == "FalseFalse"


def test_values_of_the_caller_that_are_no_data_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        render("{{ x }}", variables={"x": print})
    with pytest.raises(InvalidRequest, match="cannot be called messages"):
        render("{{ messages }}", variables={"messages": []})


def test_a_model_without_a_template_says_what_to_do(byte_level: Tokenizer) -> None:
    with pytest.raises(TemplateError) as caught:
        byte_level.apply_chat_template([USER])
    assert "--chat-template" in caught.value.remedy


def test_a_template_is_compiled_once_for_a_tokenizer(byte_level: Tokenizer) -> None:
    assert byte_level._template(CHATML, False) is byte_level._template(CHATML, False)
    for index in range(40):
        assert byte_level.apply_chat_template([USER], template=f"{{# #}}{index}") == str(index)
    assert byte_level.apply_chat_template([USER], template=CHATML) == "<|user|>hello<|end|>\n<|assistant|>"
