"""A request to ``/v1/chat/completions``, and one to ``/tokenize``.

Knows no template and no tokenizer. Messages are checked and brought into the
form that templates expect: a role and a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from midspan.decoding.sampling_params import SamplingParams
from midspan.errors import InvalidRequest
from midspan_api.protocol.generation_request import GenerationRequest, not_supported, sampling_params
from midspan_api.protocol.json_body import decode_argument

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MESSAGE_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning")
RESERVED_TEMPLATE_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "template",
        "chat_template",
        "tokenize",
        "return_dict",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
    }
)

Message = dict[str, Any]


class ChatRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    def refuse_unserved(self) -> None:
        """As for every request, and tools."""
        super().refuse_unserved()
        if self.tools and self.tool_choice != "none":
            raise not_supported("tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise not_supported("tool_choice", "Leave tool_choice out, or send none.")
        if self.functions and self.function_call != "none":
            raise not_supported("functions")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs=true only.", parameter="top_logprobs")

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters; without a limit the text may fill the model's context.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        limit_name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        limit = getattr(self, limit_name)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        try:
            return sampling_params(
                self,
                defaults,
                max_tokens=defaults.get("max_tokens") if limit is None else limit,
                logprobs=logprobs,
            )
        except InvalidRequest as error:
            named = {"logprobs": "top_logprobs", "max_tokens": limit_name}.get(error.parameter or "", error.parameter)
            raise InvalidRequest(
                error.message.replace(error.parameter or "", named or "", 1),
                remedy=error.remedy,
                parameter=named,
                code=error.code,
            ) from None


class TokenizeRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of ``POST /tokenize``: a ``prompt``, or ``messages`` to which the chat template is applied."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def template_messages(messages: list[dict[str, Any]]) -> list[Message]:
    """Messages in the form that templates expect.

    Raises:
        InvalidRequest: a role or a content that no text model can take.
    """
    if not messages:
        raise InvalidRequest("messages must not be empty.", parameter="messages", code="empty_prompt")
    return [_message(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _message(message: dict[str, Any], place: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise InvalidRequest(f"{place}.role must be one of {known}.", parameter="messages")
    result: Message = {"role": "system" if role == "developer" else role}
    content = message.get("content")
    calls = message.get("tool_calls")
    if content is None and not (role == "assistant" and calls):
        raise InvalidRequest(f"{place}.content is missing.", parameter="messages", code="missing_field")
    result["content"] = "" if content is None else _text(content, f"{place}.content")
    for name in MESSAGE_FIELDS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidRequest(f"{place}.{name} must be a text.", parameter="messages", code="invalid_type")
        result[name] = value
    if calls:
        result["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
    return result


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{place} must be a text or a list of parts.", parameter="messages", code="invalid_type")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text"):
            raise InvalidRequest(
                f"{place} has a part that is no text; this model reads text only.",
                remedy="Send parts of type text.",
                parameter="messages",
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{place} has a text part without text.", parameter="messages", code="missing_field")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{place} must be a list.", parameter="messages", code="invalid_type")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{place} has an entry without a function name.", parameter="messages")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = decode_argument(arguments or "{}", place)
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """The variables that a request passes to its template.

    Raises:
        InvalidRequest: a name that the server itself fills in.
    """
    variables = given or {}
    for name in variables:
        if name in RESERVED_TEMPLATE_VARIABLES or not name.isidentifier():
            raise InvalidRequest(
                "chat_template_kwargs holds a name that a request may not set.",
                remedy=f"Reserved are: {', '.join(sorted(RESERVED_TEMPLATE_VARIABLES))}.",
                parameter="chat_template_kwargs",
            )
    return variables
