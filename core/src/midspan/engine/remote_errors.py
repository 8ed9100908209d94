"""Errors that crossed a process border as code, message and remedy.

Knows the classes of ``midspan.errors`` by their codes and no more.
"""

from __future__ import annotations

import inspect

from midspan import errors
from midspan.errors import MidspanError


def restore_error(code: str, message: str, remedy: str) -> MidspanError:
    """The error that a code stands for.

    Classes that need more than a message and a remedy, and codes that nobody knows, become a
    plain ``MidspanError`` with that code.

    Args:
        code: a class's ``code``.
        message: what happened.
        remedy: what to do now.
    """
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, MidspanError) and kind.code == code and _is_plain(kind):
            restored: MidspanError = kind(message, remedy=remedy)
            return restored
    error = MidspanError(message, remedy=remedy)
    error.code = code
    return error


def _is_plain(kind: type[MidspanError]) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    return required == {"message"}
