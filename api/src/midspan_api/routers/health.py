"""``/livez``, ``/readyz``, ``/health``, ``/ping``, ``/version`` and ``/metrics``.

``/livez`` says that the process answers, ``/readyz`` that it takes requests, and
``/health`` asks the engine itself. All take HEAD as well, which load balancers send.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from midspan import __version__
from midspan.observation.metrics import CONTENT_TYPE
from midspan_api.routers.replies import json_response, serving_of


async def live(request: Request) -> Response:
    """The process answers."""
    return json_response({"status": "alive"})


async def ready(request: Request) -> Response:
    """New requests are taken; 503 while stopping or without an engine."""
    serving_of(request).admit()
    return json_response({"status": "ready"})


async def health(request: Request) -> Response:
    """The engine answers; 503 when it does not."""
    serving = serving_of(request)
    await serving.engine.check_health()
    return json_response({"status": "healthy"})


async def version(request: Request) -> Response:
    """The version of this software."""
    return json_response({"version": __version__})


async def metrics(request: Request) -> Response:
    """The numbers for Prometheus."""
    return Response(serving_of(request).metrics.render(), headers={"content-type": CONTENT_TYPE})


def router() -> APIRouter:
    """The routes of this resource."""
    routes = APIRouter()
    for path, handler in (
        ("/livez", live),
        ("/readyz", ready),
        ("/health", health),
        ("/version", version),
        ("/metrics", metrics),
    ):
        routes.add_api_route(path, handler, methods=["GET"], response_model=None)
        routes.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)
    for method in ("GET", "POST"):
        name = f"ping_{method.lower()}"
        routes.add_api_route("/ping", live, methods=[method], response_model=None, name=name, operation_id=name)
    return routes
