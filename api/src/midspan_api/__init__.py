"""The OpenAI-compatible server around an engine.

Knows the core and no device. ``create_app`` gives the ASGI application and
``run_server`` runs it; both are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from midspan_api.server_settings import ServerSettings

if TYPE_CHECKING:
    from midspan_api.application import create_app
    from midspan_api.server import run_server

__all__ = ["ServerSettings", "create_app", "run_server"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from midspan_api.application import create_app

        return create_app
    if name == "run_server":
        from midspan_api.server import run_server

        return run_server
    raise AttributeError(f"module 'midspan_api' has no attribute {name!r}")
