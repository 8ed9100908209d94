"""Chat templates: Jinja programs that come with a model and write a conversation out as text.

They are code from strangers, so they run in Jinja's sandbox, on plain data only,
with the few additions that published templates rely on: ``raise_exception``,
``strftime_now``, a ``tojson`` that leaves characters alone, loop controls and the
``generation`` block (which marks text for training and is transparent here).
Knows no tokenizer. What is not covered: a template can still run for long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from midspan.errors import InvalidRequest, TemplateError
from midspan.text.chat_messages import plain_data, plain_messages

_CONTINUES = "\ue0f0continues\ue0f1 "
"""Marks where the last message ends. The space at its end tells whether the template strips messages."""

LARGEST_PRODUCT = 1_000_000
"""Elements of a text or list that was multiplied."""
LARGEST_BITS = 4096
"""Of an integer that was multiplied or raised to a power."""

_TAKEN = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja.
        now: the clock behind ``strftime_now``.

    Raises:
        TemplateError: it is not valid Jinja.
    """

    def __init__(self, source: str, *, now: Callable[[], datetime] = datetime.now) -> None:
        if not isinstance(source, str):
            raise TemplateError(f"The chat template is no text but a {type(source).__name__}.", remedy="Give its text.")
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
            self._as_parts = _wants_parts(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(
                f"The chat template is not valid: {_what(error)}.", remedy="Give another with --chat-template."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: see ``chat_messages``.
            special_tokens: role -> text.
            add_generation_prompt: end where the answer begins.
            continue_final_message: end within the last message; not together with the former.
            tools: tools that the model may call, or None.
            variables: further values; ``documents`` is one.

        Raises:
            TemplateError: the template failed, or refused with a message of its own.
            InvalidRequest: messages, tools or variables of another shape.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other.",
                parameter="continue_final_message",
            )
        extra: dict[str, Any] = plain_data(variables or {}, "chat_template_kwargs")
        taken = sorted(_TAKEN & set(extra))
        if taken:
            raise InvalidRequest(f"A template variable cannot be called {taken[0]}.", parameter="chat_template_kwargs")
        plain = plain_messages(messages, as_parts=self._as_parts)
        last = _mark_end(plain) if continue_final_message else ""
        values = {
            **special_tokens,
            "documents": None,
            **extra,
            "messages": plain,
            "tools": plain_data(list(tools), "tools") if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(values)
        return _cut_at_mark(text, last) if continue_final_message else text

    def _run(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(values)
        except Exception as error:  # a stranger's program: whatever it raises is the template's failure
            raise TemplateError(
                f"The chat template failed: {_what(error)}.",
                remedy="Check the messages against what the model's template takes.",
                parameter="messages",
            ) from error


def _what(error: Exception) -> str:
    text = (str(error) or type(error).__name__).rstrip(".")
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if isinstance(error, jinja2.TemplateSyntaxError) and line else text


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Put the mark behind the last message's text; returns that text."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUES
        return content
    if not content:
        raise InvalidRequest("The last message has no text to continue.", parameter="messages")
    text: str = content[-1]["text"]
    content[-1]["text"] = text + _CONTINUES
    return text


def _cut_at_mark(text: str, last: str) -> str:
    mark = _CONTINUES.rstrip()
    place = text.rfind(mark)
    if place < 0 or last.strip() not in text[:place]:
        raise TemplateError(
            "The chat template does not write the last message out whole, so it cannot be continued.",
            remedy="Leave out continue_final_message.",
            parameter="continue_final_message",
        )
    stripped = not text.startswith(_CONTINUES, place)
    return text[:place].rstrip() if stripped else text[:place]


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: its content as it stands."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, and products and powers of bounded size: one of them can take all memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, or raise to a power.

        Raises:
            jinja2.TemplateError: the result would be too large.
        """
        if operator == "*":
            sizes = [len(side) for side in (left, right) if isinstance(side, (str, bytes, list, tuple))]
            counts = [side for side in (left, right) if isinstance(side, int)]
            too_large = bool(sizes and counts and sizes[0] * counts[0] > LARGEST_PRODUCT)
            too_large = too_large or sum(count.bit_length() for count in counts) > LARGEST_BITS
        else:
            too_large = isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > LARGEST_BITS
        if too_large:
            raise jinja2.TemplateError(f"the result of '{operator}' is too large")
        return super().call_binop(context, operator, left, right)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.pop("lipsum")  # filler text; a function that templates have no use for
    environment.globals["dict"] = _make_dict
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment


def _make_dict(**items: Any) -> dict[str, Any]:
    """``dict`` as a function only: the type itself has attributes that a template need not reach."""
    return items


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _wants_parts(tree: nodes.Template) -> bool | None:
    """How a template takes content: False as text, True as a list of parts, None as either.

    A template that goes through the content in a loop takes parts; if it also tests
    whether the content is a string, it takes both.
    """
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return False
    tests_string = any(test.name in ("string", "iterable", "sequence", "mapping") for test in tree.find_all(nodes.Test))
    return None if tests_string else True


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
