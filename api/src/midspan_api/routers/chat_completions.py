"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from midspan_api.prompt_preparation import truncated
from midspan_api.protocol.chat_reply import ChatChunks, ChatReply
from midspan_api.protocol.chat_request import ChatRequest
from midspan_api.protocol.json_body import read_json, request_schema
from midspan_api.routers.replies import collected, reply_header, serving_of, streamed


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    arrival = time.monotonic()
    serving = serving_of(request)
    serving.admit()
    body = await read_json(request, ChatRequest)
    model = serving.model_name(body.model)
    body.refuse_unserved()
    params = body.sampling(serving.engine.default_params)
    text = await serving.prompts.chat_text(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        variables=body.chat_template_kwargs,
    )
    context = serving.engine.model.max_model_len
    (token_ids,) = await serving.prompts.encode_all(
        [text],
        add_special_tokens=bool(body.add_special_tokens),
        context=context if body.truncate_prompt_tokens is None else None,
        parameter="messages",
    )
    token_ids = truncated(token_ids, body.truncate_prompt_tokens, context)
    live = await serving.submit(
        token_ids,
        params,
        parameter="messages",
        arrival=arrival,
        priority=body.priority or 0,
        cache_salt=body.cache_salt,
    )
    header = reply_header("chatcmpl-", model, body.request_id, request)
    token_bytes = serving.engine.tokenizer.token_bytes
    if body.stream:
        chunks = ChatChunks(body, header, token_bytes)
        return streamed([live], lambda _, output: chunks.events(output), chunks.closing)
    reply = ChatReply(body, header, token_bytes)
    return await collected(request, [live], lambda _, output: reply.add(output), reply.json_object)


def router() -> APIRouter:
    """The routes of this resource."""
    routes = APIRouter()
    routes.add_api_route(
        "/v1/chat/completions",
        create_chat_completion,
        methods=["POST"],
        response_model=None,
        openapi_extra=request_schema(ChatRequest),
    )
    return routes
