"""The flags that say how an engine is started; names are vLLM's where vLLM has the flag."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import typer

from midspan.errors import SettingsError
from midspan.settings import EngineSettings

MODEL = "Model"
DEVICE = "Device"
CACHE = "Cache"
SCHEDULER = "Scheduler"

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
HUMAN_INTEGER = re.compile(r"(\d+(?:\.\d+)?)([kmgKMG]?)")


def human_integer(text: str) -> int:
    """An integer that may end in k, m, g (powers of 1000) or K, M, G (powers of 1024).

    Raises:
        typer.BadParameter: it is no such number.
    """
    match = HUMAN_INTEGER.fullmatch(str(text))
    value = float(match[1]) * UNITS[match[2]] if match else 0.5
    if value != int(value):
        raise typer.BadParameter(f"{text!r} is not a whole number such as 4096, 4k or 8G.")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Flags of every command that starts an engine."""

    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or file of another tokenizer.", rich_help_panel=MODEL)
    ] = None
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.", rich_help_panel=MODEL)] = None
    load_format: Annotated[
        str,
        typer.Option(help="auto, or dummy: random weights, for which config.json is enough.", rich_help_panel=MODEL),
    ] = EngineSettings.load_format
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)] = (
        EngineSettings.dtype
    )
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Quantize linear weights while loading: int8 (weights and inputs), w8a16, int4 or fp8.",
            rich_help_panel=MODEL,
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=human_integer,
            metavar="TOKENS",
            help="Tokens of one request, prompt and output. Default: what the model and the memory allow.",
            rich_help_panel=MODEL,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Source of seeds for requests without one.", rich_help_panel=MODEL)] = (
        EngineSettings.seed
    )
    device: Annotated[
        list[str],
        typer.Option(
            help="auto, or a name that 'midspan devices' lists. serve takes several, and runs an engine on each.",
            rich_help_panel=DEVICE,
        ),
    ] = field(default_factory=lambda: [EngineSettings.device])
    device_option: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the device's own; DEVICE/KEY=VALUE where several were named.",
            rich_help_panel=DEVICE,
        ),
    ] = field(default_factory=list)
    kernel: Annotated[
        list[str],
        typer.Option(
            metavar="OPERATION=KERNEL",
            help="Serve an operation with this kernel; DEVICE/OPERATION=KERNEL where several devices were named.",
            rich_help_panel=DEVICE,
        ),
    ] = field(default_factory=list)
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse portable fallback kernels.", rich_help_panel=DEVICE)
    ] = False
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per cache block. Default: the device's.", rich_help_panel=CACHE)
    ] = None
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Element type of the KV cache: auto, float32, bfloat16, float16, fp8 or int8.", rich_help_panel=CACHE
        ),
    ] = EngineSettings.kv_cache_dtype
    memory_utilization: Annotated[
        float | None,
        typer.Option(
            "--memory-utilization",
            "--gpu-memory-utilization",
            help="Share of the free device memory for the cache.",
            rich_help_panel=CACHE,
        ),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            parser=human_integer, metavar="BYTES", help="Memory for the cache, e.g. 4G.", rich_help_panel=CACHE
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse the cache of equal prefixes.",
            rich_help_panel=CACHE,
        ),
    ] = True
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="Sequences in one step. Default: 256, or what the device takes.", rich_help_panel=SCHEDULER),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            parser=human_integer,
            metavar="TOKENS",
            help="Tokens in one step. Default: 2048, or what the device takes.",
            rich_help_panel=SCHEDULER,
        ),
    ] = None
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority.", rich_help_panel=SCHEDULER)] = (
        EngineSettings.scheduling_policy
    )
    max_queued_requests: Annotated[
        int, typer.Option(help="Waiting requests before new ones are refused; 0: no limit.", rich_help_panel=SCHEDULER)
    ] = EngineSettings.max_queued_requests or 0

    step_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Silence of a busy engine process before it is taken for stuck and replaced; 0: never.",
            rich_help_panel=SCHEDULER,
        ),
    ] = EngineSettings.step_timeout or 0.0

    def settings(self, model: str, *, served_model_name: Sequence[str] = ()) -> EngineSettings:
        """The engine's settings for a model.

        Raises:
            SettingsError: a value cannot work, or several devices were named.
        """
        if len(self.device) > 1:
            raise SettingsError(
                f"This command runs on one device; {', '.join(self.device)} were named.",
                remedy="Name one; 'midspan serve' takes several.",
            )
        return self.replica_settings(model, served_model_name=served_model_name)[0]

    def replica_settings(self, model: str, *, served_model_name: Sequence[str] = ()) -> list[EngineSettings]:
        """Settings of one engine for each device that was named, in their order.

        Raises:
            SettingsError: a value cannot work.
        """
        return [self._settings_on(device, model, served_model_name) for device in self.device]

    def _settings_on(self, device: str, model: str, served_model_name: Sequence[str]) -> EngineSettings:
        if self.max_queued_requests < 0:
            raise SettingsError(f"--max-queued-requests must be 0 or more, not {self.max_queued_requests}.")
        return EngineSettings(
            model=model,
            tokenizer=self.tokenizer,
            revision=self.revision,
            load_format=self.load_format,
            device=device,
            device_options=pairs("--device-option", self._meant_for(device, "--device-option", self.device_option)),
            dtype=self.dtype,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            scheduling_policy=self.scheduling_policy,
            memory_utilization=self.memory_utilization,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            seed=self.seed,
            kernels=pairs("--kernel", self._meant_for(device, "--kernel", self.kernel)),
            strict=self.strict,
            max_queued_requests=self.max_queued_requests or None,
            step_timeout=self.step_timeout or None,
            served_model_name=tuple(served_model_name),
        )

    def _meant_for(self, device: str, flag: str, values: Sequence[str]) -> list[str]:
        """Those for every device, and those that name this one before a slash, without it."""
        chosen = []
        for text in values:
            name, slash, rest = text.partition("/")
            if not slash or "=" in name:
                chosen.append(text)
            elif name not in self.device:
                raise SettingsError(
                    f"{flag} {text!r} is for a device {name!r}, but the devices are {', '.join(self.device)}."
                )
            elif name == device:
                chosen.append(rest)
        return chosen


def pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a mapping.

    Raises:
        SettingsError: a text has no key or no ``=``, or a key comes twice.
    """
    result: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise SettingsError(f"{flag} {text!r} is not of the form KEY=VALUE.")
        if key in result:
            raise SettingsError(f"{flag} gives {key!r} twice.")
        result[key] = value
    return result
