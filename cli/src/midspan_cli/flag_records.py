"""Lets a command take a record of flags as one parameter.

Several commands share the flags that say how an engine is started. Such flags
are written once, as the annotated fields of a dataclass; a command names the
dataclass as the type of a parameter, and the parser sees the fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def with_records(function: Callable[..., None]) -> Callable[..., None]:
    """The same command, with each dataclass parameter replaced by the dataclass's fields."""
    hints = get_type_hints(function, include_extras=True)
    records: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name, parameter.annotation)
        if is_dataclass(hint) and isinstance(hint, type):
            records[parameter.name] = hint
            parameters += _field_parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
    if not records:
        return function

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, record in records.items():
            own = {field.name: values.pop(field.name) for field in fields(record)}
            values[name] = record(**own)
        function(**values)

    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _field_parameters(record: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    result = []
    for field in fields(record):
        default = field.default
        if default is MISSING:
            default = field.default_factory() if field.default_factory is not MISSING else inspect.Parameter.empty
        result.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
        )
    return result
