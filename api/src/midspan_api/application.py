"""Puts the application together: routes, layers and error handlers.

``create_app`` is all that another ASGI host needs; ``midspan_api.server`` runs it
with uvicorn. Nothing here starts or stops an engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from midspan import __version__
from midspan.errors import MidspanError
from midspan_api.event_stream import ClientGone
from midspan_api.middleware.authentication import Authentication
from midspan_api.middleware.body_limit import BodyLimit
from midspan_api.middleware.request_context import RequestContext
from midspan_api.protocol.error_body import http_error, wire_error
from midspan_api.routers import chat_completions, completions, health, models, tokenization
from midspan_api.server_settings import ServerSettings
from midspan_api.serving import Serving

if TYPE_CHECKING:
    from midspan.engine.serving_engine import ServingEngine

CLIENT_CLOSED_REQUEST = 499
"""Status that nobody receives; it stands in the metrics."""


def create_app(
    engine: ServingEngine, server_settings: ServerSettings | None = None, *, load_seconds: float = 0.0
) -> FastAPI:
    """The application around a started engine.

    Args:
        engine: an ``AsyncEngine`` or a ``ReplicaSet``; who starts it also closes it.
        server_settings: None: the defaults.
        load_seconds: time that its start took, for the metrics.

    Returns:
        An ASGI application; ``app.state.serving`` holds what the routes share.
    """
    settings = server_settings or ServerSettings()
    serving = Serving(engine, settings, load_seconds=load_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.close()

    app = FastAPI(
        title="Midspan",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        root_path=settings.root_path,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.serving = serving
    for resource in (completions, chat_completions, models, tokenization, health):
        app.include_router(resource.router())
    app.add_exception_handler(MidspanError, _deliberate)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(RequestValidationError, _routing)
    app.add_exception_handler(ClientGone, _gone)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Authentication, keys=settings.api_keys, root_path=settings.root_path)
    app.add_middleware(RequestContext, count=serving.metrics.observe_http)
    return app


async def _deliberate(request: Request, error: Exception) -> Response:
    return wire_error(error).response()


async def _routing(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return http_error(400, "The request does not fit this route.").response()
    message = {
        404: f"There is no route {request.url.path[:200]} here.",
        405: f"The route {request.url.path[:200]} does not take {request.method}.",
    }.get(error.status_code, str(error.detail)[:200])
    return http_error(error.status_code, message, error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
