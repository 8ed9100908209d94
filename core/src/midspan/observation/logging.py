"""How log lines look: text or JSON, with the request's id in each line.

Knows nothing of what is logged. Prompts and generated text are never logged;
the callers hand over counts and ids only. Nothing is configured by importing
this module: a program calls ``configure_logging`` once.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

from midspan.errors import SettingsError

LOGGER = "midspan"
"""Root of all loggers of this project."""

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")

current_request_id: ContextVar[str | None] = ContextVar("midspan_request_id", default=None)
"""Id of the request that the running task works for; set at the server's edge."""

FIELDS = "fields"
"""Name of the record attribute that holds a line's structured fields."""


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO midspan.api [request-id] message key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback below it where there is one."""
        request_id = current_request_id.get()
        parts = [_timestamp(record), record.levelname, record.name]
        if request_id:
            parts.append(f"[{request_id}]")
        parts.append(_one_line(record.getMessage()))
        parts += [f"{key}={_shown(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, ``request_id`` and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = current_request_id.get()
        if request_id:
            line["request_id"] = request_id
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(*, style: str = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Send the project's log lines to a stream.

    Calling it again replaces the earlier choice.

    Args:
        style: ``text`` or ``json``.
        level: ``debug``, ``info``, ``warning`` or ``error``.
        stream: where to; None: standard error.

    Raises:
        SettingsError: an unknown style or level.
    """
    if style not in FORMATS:
        raise SettingsError(f"The log format {style!r} is not known.", remedy=f"Take one of {', '.join(FORMATS)}.")
    if level not in LEVELS:
        raise SettingsError(f"The log level {level!r} is not known.", remedy=f"Take one of {', '.join(LEVELS)}.")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logger = logging.getLogger(LOGGER)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def log_fields(logger: logging.Logger, level: int, message: str, **fields: object) -> None:
    """Write a line with structured fields; a field that is None is left out."""
    if logger.isEnabledFor(level):
        present = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, message, extra={FIELDS: present})


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, FIELDS, None)
    return fields if isinstance(fields, dict) else {}


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(character.isspace() or character == '"' for character in text) else text


def _one_line(message: str) -> str:
    return message.replace("\r", "\\r").replace("\n", "\\n")
