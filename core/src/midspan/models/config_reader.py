"""Reads fields of a published ``config.json`` with errors that name the field.

Knows nothing about any model: only types, ranges and defaults. A value of the
wrong type or out of range is a damaged checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midspan.errors import CheckpointError

REMEDY = "Check the model's config.json against the published one, or download it again."

LARGEST = 2**31 - 1
"""No size in a config is larger; what is larger is damage."""


@dataclass(frozen=True)
class ConfigReader:
    """A view of one (sub)config.

    Attributes:
        fields: the parsed JSON object.
        where: prefix of field names in messages, ``"rope_scaling."``.
    """

    fields: Mapping[str, Any]
    where: str = ""

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def integer(self, name: str, *, default: int | None = None, low: int = 1, high: int = LARGEST) -> int:
        """An integer between low and high; null or missing: the default, or an error without one."""
        value = self._present(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(name, f"must be an integer, not {value!r}")
        if not low <= value <= high:
            raise self._error(name, f"must be between {low} and {high}, not {value}")
        return value

    def number(
        self, name: str, *, default: float | None = None, above: float = 0.0, high: float = float(2**62)
    ) -> float:
        """A finite number above ``above``; null or missing: the default, or an error without one."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._error(name, f"must be a number, not {value!r}")
        if not above < value <= high:
            raise self._error(name, f"must be above {above:g} and at most {high:g}, not {value}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self._error(name, f"must be true or false, not {value!r}")
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string."""
        value = self._present(name, default)
        if not isinstance(value, str):
            raise self._error(name, f"must be a string, not {value!r}")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers above 0."""
        value = self._present(name, None)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise self._error(name, f"must be a list of {count} numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item) or item <= 0:
                raise self._error(name, f"must hold numbers above 0, not {item!r}")
        return tuple(float(item) for item in value)

    def texts(self, name: str, count: int) -> tuple[str, ...]:
        """A list of so many strings."""
        value = self._present(name, None)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise self._error(name, f"must be a list of {count} strings")
        if not all(isinstance(item, str) for item in value):
            raise self._error(name, "must be a list of strings")
        return tuple(value)

    def child(self, name: str) -> ConfigReader:
        """A nested object; null or missing: an empty one."""
        value = self.fields.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self._error(name, f"must be an object, not {value!r}")
        return ConfigReader(value, f"{self.where}{name}.")

    def _present(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"The model's config has no field '{self.where}{name}'.", remedy=REMEDY)
        return default

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"The model's config field '{self.where}{name}' {problem}.", remedy=REMEDY)
