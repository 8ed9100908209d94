"""Conversations as clients send them, checked and brought to plain data.

The shape is OpenAI's. What comes out is built anew of strings, numbers, lists
and dictionaries, so that a template can neither change the caller's objects nor
call anything on them. Knows no template and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from midspan.errors import InvalidRequest

_MAX_DEPTH = 32


def plain_messages(messages: object, *, as_parts: bool | None) -> list[dict[str, Any]]:
    """Check messages and copy them.

    Args:
        messages: each with a role, and with content: text, or a list of text parts.
        as_parts: False: text parts are joined by line breaks into one text; True: a text becomes a list
            of one part; None: both stay as they are.

    Returns:
        Fresh dictionaries; content that is missing beside tool calls is an empty text, and the
        arguments of tool calls are values, not JSON.

    Raises:
        InvalidRequest: another shape; the message names the place.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise _wrong("messages", "must be a list of at least one message")
    return [_message(message, f"messages[{index}]", as_parts) for index, message in enumerate(messages)]


def plain_data(value: object, where: str, depth: int = 0) -> Any:
    """Copy JSON-like data.

    Raises:
        InvalidRequest: something else is in it, or it is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise _wrong(where, f"is nested more than {_MAX_DEPTH} deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_key(key, where): plain_data(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [plain_data(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, str):
        return str.__str__(value)
    raise _wrong(where, f"must be text, a number, a list or an object, not {type(value).__name__}")


def _message(message: object, where: str, as_parts: bool | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, "must be an object with role and content")
    plain: dict[str, Any] = plain_data(message, where)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise _wrong(f"{where}.role", "must be a text")
    if plain.get("tool_calls") is not None:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    else:
        plain.pop("tool_calls", None)
    content = plain.get("content")
    if content is None:
        if not (role == "assistant" and plain.get("tool_calls")):
            raise _wrong(f"{where}.content", "must be a text or a list of text parts")
        content = ""
    plain["content"] = _content(content, f"{where}.content", as_parts)
    return plain


def _content(content: object, where: str, as_parts: bool | None) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if as_parts else content
    if not isinstance(content, list):
        raise _wrong(where, "must be a text or a list of text parts")
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    return "\n".join(part["text"] for part in parts) if as_parts is False else parts


def _part(part: object, where: str) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _wrong(where, "must be an object with a type")
    if part["type"] != "text":
        raise _wrong(where, f"is of type {part['type']!r}; this model takes text only")
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{where}.text", "must be a text")
    return part


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Arguments come as JSON text from clients; templates write them out as values."""
    if not isinstance(calls, list):
        raise _wrong(where, "must be a list")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"{where}[{index}].function", "must be an object with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments or "{}")
            except ValueError as error:
                raise _wrong(f"{where}[{index}].function.arguments", f"is not JSON: {error}") from error
    return calls


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise _wrong(where, f"has a key that is no text: {key!r}")
    return str.__str__(key)


def _wrong(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where} {what}.",
        parameter=where.partition("[")[0].partition(".")[0],
        remedy="Correct the request.",
    )
