"""Lets a request in only with a key, except on the few routes that are open to all.

Every route is guarded unless it is listed here, so that a new one cannot be
forgotten. The path is compared whole, as the application routes it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from midspan_api.protocol.error_body import Unauthorized, wire_error

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping", "/version"})


class Authentication:
    """ASGI middleware that asks for ``Authorization: Bearer KEY``.

    Keys are kept and compared as hashes, each comparison in constant time and
    none of them skipped, so that the time says nothing about them.

    Args:
        app: what is guarded.
        keys: the valid keys; none: everybody may enter.
        root_path: prefix that the server stands under.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], root_path: str = "") -> None:
        self._app = app
        self._hashes = tuple(_hash(key.encode()) for key in keys)
        self._open = OPEN_PATHS | {root_path.rstrip("/") + path for path in OPEN_PATHS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] not in ("http", "websocket") or not self._hashes or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        if self._knows(_bearer(scope)):
            await self._app(scope, receive, send)
            return
        error = Unauthorized(
            "This server asks for an API key, and the request brings none that it knows.",
            remedy="Send the header Authorization: Bearer KEY.",
        )
        await wire_error(error).response()(scope, receive, send)

    def _knows(self, key: bytes | None) -> bool:
        offered = _hash(key or b"")
        matches = [hmac.compare_digest(offered, known) for known in self._hashes]
        return key is not None and any(matches)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else None
    return None
