"""Reads a request's JSON body into a record.

Knows no route. A body that does not fit is one short ``InvalidRequest``: the
message names the place and what was expected there, and never repeats what the
client sent.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from midspan.errors import InvalidRequest, MidspanError

Record = TypeVar("Record", bound=msgspec.Struct)

PLACE = re.compile(r" - at `\$(?P<path>[^`]*)`$")
FIRST_FIELD = re.compile(r"\.(\w+)")
MISSING_FIELD = re.compile(r"missing required field `(\w+)`")


class UnsupportedMediaType(MidspanError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


async def read_json(request: Request, record: type[Record]) -> Record:
    """The body of ``request`` as a ``record``.

    Raises:
        UnsupportedMediaType: the content type is not JSON.
        InvalidRequest: the body is not JSON, or does not fit the record.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", content_type):
        raise UnsupportedMediaType(
            "The request body must be JSON.", remedy="Send the header Content-Type: application/json."
        )
    return decode(await request.body(), record)


def decode(body: bytes, record: type[Record]) -> Record:
    """Parse ``body``; see ``read_json`` for the errors."""
    try:
        return msgspec.json.decode(body, type=record)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(_not_json(body, error), code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from None


def decode_argument(text: str, place: str) -> Any:
    """The value of a JSON text that stands inside a request, such as a function's arguments.

    Args:
        text: JSON.
        place: the request field and where in it, for errors.

    Raises:
        InvalidRequest: it is not JSON.
    """
    parameter = place.partition("[")[0]
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError):
        raise InvalidRequest(f"{place} has arguments that are not JSON.", parameter=parameter) from None
    except RecursionError:
        raise InvalidRequest(f"{place} has arguments that are nested too deeply.", parameter=parameter) from None


def _not_json(body: bytes, error: Exception) -> str:
    if not body.strip():
        return "The request body is empty; a JSON object is expected."
    where = re.search(r"\(byte (\d+)\)", str(error))
    return f"The request body is not valid JSON{f' (at byte {where[1]})' if where else ''}."


def _explain(problem: str) -> InvalidRequest:
    place = PLACE.search(problem)
    path = place["path"] if place else ""
    what = problem[: place.start()] if place else problem
    missing = MISSING_FIELD.search(what)
    if missing:
        where = f" of {path[1:]}" if path else ""
        return InvalidRequest(
            f"The required field {missing[1]}{where} is missing.",
            parameter=missing[1] if not path else _first_field(path),
            code="missing_field",
        )
    if not path:
        return InvalidRequest(f"The request body must be a JSON object. {what}.", code="invalid_type")
    text = what.replace("`", "").removesuffix(".")
    code = "invalid_value" if "out of range" in text else "invalid_type"
    return InvalidRequest(f"{path[1:]}: {text}.", parameter=_first_field(path), code=code)


def _first_field(path: str) -> str | None:
    match = FIRST_FIELD.match(path)
    return match[1] if match else None


def request_schema(record: type[msgspec.Struct]) -> dict[str, Any]:
    """The OpenAPI request body of a record, with all references written out."""
    (schema,), components = msgspec.json.schema_components((record,), ref_template="{name}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inline(schema, components)}}}}


def _inline(schema: Any, components: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(components[schema["$ref"]], components)
        return {key: _inline(value, components) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_inline(value, components) for value in schema]
    return schema
