"""``GET /v1/models`` and ``GET /v1/models/{id}``; names may hold slashes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from midspan_api.routers.replies import json_response, serving_of
from midspan_api.serving import Serving


async def list_models(request: Request) -> Response:
    """All names under which the model is served."""
    serving = serving_of(request)
    return json_response({"object": "list", "data": [_card(serving, name) for name in serving.model_names]})


async def retrieve_model(request: Request) -> Response:
    """One of them."""
    serving = serving_of(request)
    return json_response(_card(serving, serving.model_name(request.path_params["model_id"])))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    model = serving.engine.model
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "midspan",
        "root": name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def router() -> APIRouter:
    """The routes of this resource."""
    routes = APIRouter()
    routes.add_api_route("/v1/models", list_models, methods=["GET"], response_model=None)
    routes.add_api_route("/v1/models/{model_id:path}", retrieve_model, methods=["GET"], response_model=None)
    return routes
