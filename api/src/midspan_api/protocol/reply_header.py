"""What every object of one reply repeats: id, time and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, kw_only=True)
class ReplyHeader:
    """Identity of a reply.

    Attributes:
        id: ``chatcmpl-...`` or ``cmpl-...``.
        created: Unix time in seconds.
        model: the name under which the client asked for the model.
    """

    id: str
    created: int
    model: str

    def json_object(self, kind: str) -> dict[str, Any]:
        """The opening fields of an object of the given kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self, kind: str) -> bytes:
        """The same as JSON text without its closing brace."""
        return msgspec.json.encode(self.json_object(kind))[:-1]


def event(value: Any) -> bytes:
    """A server-sent event that carries ``value`` as JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The event that ends every stream."""
