"""Engine settings from the keywords of a call, with vLLM's names for what it calls otherwise.

Knows names only; values are checked by ``EngineSettings``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from midspan.errors import SettingsError
from midspan.settings import EngineSettings

ALIASES: Mapping[str, str] = {"gpu_memory_utilization": "memory_utilization"}
"""vLLM's name -> ours."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "enforce_eager": (False, True),
    "disable_log_stats": (False, True),
    "trust_remote_code": (False, True),
    "enable_chunked_prefill": (True,),
}
"""vLLM's settings that change nothing here, with the values for which that is so. Code out of a
model's folder is never run, so trusting it or not is the same."""


def settings_from_keywords(model: str, keywords: Mapping[str, Any]) -> EngineSettings:
    """Settings for a model.

    Args:
        model: folder, file, hub name or ``pypi:PACKAGE``.
        keywords: other settings by name.

    Raises:
        SettingsError: a name is not known, or a value cannot work.
    """
    known = [field.name for field in dataclasses.fields(EngineSettings)]
    chosen: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise SettingsError(
                    f"{name}={value!r} is not supported.",
                    remedy=f"Leave it out or set it to {' or '.join(repr(item) for item in NEUTRAL[name])}.",
                )
            continue
        target = ALIASES.get(name, name)
        if target not in known:
            near = difflib.get_close_matches(name, [*known, *ALIASES, *NEUTRAL], n=1)
            raise SettingsError(
                f"There is no setting {name!r}.",
                remedy=f"Did you mean {near[0]!r}?" if near else f"Settings: {', '.join(known)}.",
            )
        chosen[target] = value
    return EngineSettings(model=model, **chosen)
