"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from midspan.errors import InvalidRequest
from midspan_api.protocol.chat_request import TokenizeRequest
from midspan_api.protocol.completion_request import DetokenizeRequest
from midspan_api.protocol.json_body import read_json, request_schema
from midspan_api.routers.replies import json_response, serving_of
from midspan_api.serving import Serving


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages in the chat template."""
    serving = serving_of(request)
    body = await read_json(request, TokenizeRequest)
    serving.model_name(body.model)
    text, special = await _text(serving, body)
    (token_ids,) = await serving.prompts.encode_all([text], add_special_tokens=special, parameter="prompt")
    token_text = serving.engine.tokenizer.token_text
    return json_response(
        {
            "count": len(token_ids),
            "max_model_len": serving.engine.model.max_model_len,
            "tokens": token_ids,
            "token_strs": [token_text(token_id) for token_id in token_ids] if body.return_token_strs else None,
        }
    )


async def _text(serving: Serving, body: TokenizeRequest) -> tuple[str, bool]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Send either prompt or messages.", parameter="prompt", code="missing_field")
    if body.messages is None:
        return body.prompt or "", body.add_special_tokens is not False
    text = await serving.prompts.chat_text(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        variables=body.chat_template_kwargs,
    )
    return text, bool(body.add_special_tokens)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    serving = serving_of(request)
    body = await read_json(request, DetokenizeRequest)
    serving.model_name(body.model)
    text = await serving.prompts.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return json_response({"prompt": text})


def router() -> APIRouter:
    """The routes of this resource."""
    routes = APIRouter()
    for path, handler, record in (
        ("/tokenize", tokenize, TokenizeRequest),
        ("/detokenize", detokenize, DetokenizeRequest),
    ):
        routes.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra=request_schema(record))
    return routes
