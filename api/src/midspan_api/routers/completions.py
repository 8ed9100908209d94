"""``POST /v1/completions``."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from midspan_api.live_request import LiveRequest
from midspan_api.prompt_preparation import truncated
from midspan_api.protocol.completion_reply import CompletionChunks, CompletionReply
from midspan_api.protocol.completion_request import CompletionRequest, Prompt
from midspan_api.protocol.json_body import read_json, request_schema
from midspan_api.routers.replies import close_all, collected, reply_header, serving_of, streamed
from midspan_api.serving import Serving


async def create_completion(request: Request) -> Response:
    """Continue one prompt or several."""
    arrival = time.monotonic()
    serving = serving_of(request)
    serving.admit()
    body = await read_json(request, CompletionRequest)
    model = serving.model_name(body.model)
    body.refuse_unserved()
    prompts = body.prompts(serving.settings.max_prompts)
    encoded = await _encoded(serving, body, prompts)
    texts = await _shown(serving, body, prompts, encoded)
    lives = await _submit(serving, body, encoded, arrival)
    header = reply_header("cmpl-", model, body.request_id, request)
    token_text = serving.engine.tokenizer.token_text
    if body.stream:
        chunks = CompletionChunks(body, header, texts, token_text)
        return streamed(lives, chunks.events, chunks.closing)
    reply = CompletionReply(body, header, texts, token_text)
    return await collected(request, lives, reply.add, reply.json_object)


async def _submit(
    serving: Serving, body: CompletionRequest, encoded: list[list[int]], arrival: float
) -> list[LiveRequest]:
    params = body.sampling(serving.engine.default_params)
    lives: list[LiveRequest] = []
    try:
        for token_ids in encoded:
            live = await serving.submit(
                token_ids,
                params,
                parameter="prompt",
                arrival=arrival,
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
            )
            lives.append(live)
    except BaseException:
        await close_all(lives)
        raise
    return lives


async def _encoded(serving: Serving, body: CompletionRequest, prompts: list[Prompt]) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    context = serving.engine.model.max_model_len
    made = iter(
        await serving.prompts.encode_all(
            texts,
            add_special_tokens=body.add_special_tokens is not False,
            context=context if body.truncate_prompt_tokens is None else None,
            parameter="prompt",
        )
    )
    encoded = [next(made) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [truncated(token_ids, body.truncate_prompt_tokens, context) for token_ids in encoded]


async def _shown(
    serving: Serving, body: CompletionRequest, prompts: list[Prompt], encoded: list[list[int]]
) -> list[str]:
    """The prompts as ``echo`` repeats them; of a prompt that was cut, what is left."""
    if not body.echo:
        return [""] * len(prompts)
    whole = body.truncate_prompt_tokens is None
    return [
        prompt
        if isinstance(prompt, str) and whole
        else await serving.prompts.decode(token_ids, skip_special_tokens=False, parameter="prompt")
        for prompt, token_ids in zip(prompts, encoded, strict=True)
    ]


def router() -> APIRouter:
    """The routes of this resource."""
    routes = APIRouter()
    routes.add_api_route(
        "/v1/completions",
        create_completion,
        methods=["POST"],
        response_model=None,
        openapi_extra=request_schema(CompletionRequest),
    )
    return routes
