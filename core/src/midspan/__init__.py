"""Midspan: language models on any hardware.

The public names are loaded when they are first used, so that importing the
package costs nothing.

PYTEST_DONT_REWRITE: the package brings options to pytest and may be imported before it;
it has no assertions, and says so, lest pytest warn of it in other people's runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from midspan.decoding.sampling_params import SamplingParams as SamplingParams
    from midspan.engine.async_engine import AsyncEngine as AsyncEngine
    from midspan.engine.llm import LLM as LLM
    from midspan.engine.outputs import CompletionOutput as CompletionOutput
    from midspan.engine.outputs import Logprob as Logprob
    from midspan.engine.outputs import RequestOutput as RequestOutput
    from midspan.errors import CacheTooSmall as CacheTooSmall
    from midspan.errors import ContextLengthExceeded as ContextLengthExceeded
    from midspan.errors import DeviceNotFound as DeviceNotFound
    from midspan.errors import EngineDead as EngineDead
    from midspan.errors import InvalidRequest as InvalidRequest
    from midspan.errors import MidspanError as MidspanError
    from midspan.errors import ModelNotFound as ModelNotFound
    from midspan.errors import QueueFull as QueueFull
    from midspan.errors import RequestFailed as RequestFailed
    from midspan.errors import SettingsError as SettingsError
    from midspan.errors import UnsupportedModel as UnsupportedModel
    from midspan.settings import EngineSettings as EngineSettings
    from midspan.settings import Environment as Environment

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "midspan.engine.async_engine",
    "CacheTooSmall": "midspan.errors",
    "CompletionOutput": "midspan.engine.outputs",
    "ContextLengthExceeded": "midspan.errors",
    "DeviceNotFound": "midspan.errors",
    "EngineDead": "midspan.errors",
    "EngineSettings": "midspan.settings",
    "Environment": "midspan.settings",
    "InvalidRequest": "midspan.errors",
    "LLM": "midspan.engine.llm",
    "Logprob": "midspan.engine.outputs",
    "MidspanError": "midspan.errors",
    "ModelNotFound": "midspan.errors",
    "QueueFull": "midspan.errors",
    "RequestFailed": "midspan.errors",
    "RequestOutput": "midspan.engine.outputs",
    "SamplingParams": "midspan.decoding.sampling_params",
    "SettingsError": "midspan.errors",
    "UnsupportedModel": "midspan.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'midspan' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
