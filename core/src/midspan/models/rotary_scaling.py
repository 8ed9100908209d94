"""Inverse frequencies of rotary position embeddings, with the published scalings.

Reads ``rope_theta`` + ``rope_scaling`` (published ``config.json`` files) and
``rope_parameters`` (files written by newer tools). Knows no model and no
operation; arithmetic is float32, as the models were trained with.

A program has fixed frequencies. Two scalings depend on the length of the
sequence by definition: ``dynamic`` equals the plain embedding up to the model's
own number of positions, which is where the program ends; ``longrope`` has one set up
to its original length and one beyond it, and the set of the model's full length
is taken.

Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), YaRN
(2309.00071), LongRoPE (2402.13753), the Llama 3.1 model card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.graph.builder import Rotary
from midspan.models.config_reader import REMEDY, ConfigReader

Frequencies = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The unscaled embedding: what a scaling starts from."""

    theta: float
    size: int
    max_position: int

    def frequencies(self) -> Frequencies:
        """float32 [size / 2], falling: 1 / theta^(2i / size)."""
        inverse: Frequencies = np.float32(1.0) / self.powers()
        return inverse

    def powers(self) -> Frequencies:
        """float32 [size / 2], rising: theta^(2i / size)."""
        exponents = np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size)
        powers: Frequencies = np.power(np.float32(self.theta), exponents)
        return powers


def read_rotary(config: ConfigReader, *, head_size: int, max_position: int, default_theta: float = 10000.0) -> Rotary:
    """The rotary embedding that a config describes.

    Args:
        config: the model's config.
        head_size: columns of a head.
        max_position: positions for which the model was made.
        default_theta: when the config names none.

    Raises:
        CheckpointError: a field is missing or absurd.
        UnsupportedModel: a scaling that is not known here.
    """
    fields = config.child("rope_parameters") if config.has("rope_parameters") else config.child("rope_scaling")
    theta_owner = fields if fields.has("rope_theta") else config
    theta = theta_owner.number("rope_theta", default=default_theta, above=1.0)
    share_owner = fields if fields.has("partial_rotary_factor") else config
    size = int(head_size * share_owner.number("partial_rotary_factor", default=1.0, high=1.0))
    if size < 2 or size % 2:
        raise CheckpointError(f"Heads of {head_size} columns leave {size} to rotate; it must be even.", remedy=REMEDY)
    kind = fields.text("rope_type", default=fields.text("type", default="default"))
    scaling = _SCALINGS.get(kind)
    if scaling is None:
        raise UnsupportedModel(
            f"The rotary scaling '{kind}' ({fields.where}rope_type) is not known.",
            remedy=f"Known scalings: {', '.join(sorted(_SCALINGS))}.",
        )
    frequencies, amplitude = scaling(
        _Base(theta=theta, size=size, max_position=max_position), _with_original_length(fields, config)
    )
    return Rotary(
        head_size=head_size,
        rotary_size=size,
        inverse_frequencies=tuple(float(value) for value in frequencies.astype(np.float32)),
        amplitude=amplitude,
    )


def _with_original_length(fields: ConfigReader, config: ConfigReader) -> ConfigReader:
    name = "original_max_position_embeddings"
    if not config.has(name):
        return fields
    return ConfigReader({**fields.fields, name: config.fields[name]}, fields.where)


def _default(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    return base.frequencies(), 1.0


def _linear(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    return base.frequencies() / np.float32(fields.number("factor")), 1.0


def _dynamic(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    fields.number("factor")
    return base.frequencies(), 1.0


def _llama3(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    factor = np.float32(fields.number("factor"))
    low = fields.number("low_freq_factor")
    high = fields.number("high_freq_factor", above=low)
    original = fields.integer("original_max_position_embeddings", default=base.max_position)
    plain = base.frequencies()
    wavelengths = np.float32(2 * math.pi) / plain
    blend = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - blend) * plain / factor + blend * plain
    scaled = np.where(wavelengths > original / low, plain / factor, between)
    return np.where(wavelengths < original / high, plain, scaled), 1.0


def _yarn(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    original = fields.integer("original_max_position_embeddings", default=base.max_position)
    factor = fields.number("factor", default=base.max_position / original)
    fast, slow = fields.number("beta_fast", default=32.0), fields.number("beta_slow", default=1.0)

    def column_of(rotations: float) -> float:
        return base.size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = column_of(fast), column_of(slow)
    if fields.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, base.size - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(base.size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    interpolated_share = np.clip(ramp, 0, 1)
    plain_share = 1 - interpolated_share
    interpolated = np.float32(1.0) / (np.float32(factor) * base.powers())
    frequencies = interpolated * (1 - plain_share) + base.frequencies() * plain_share
    return frequencies, _yarn_amplitude(factor, fields)


def _yarn_amplitude(factor: float, fields: ConfigReader) -> float:
    if fields.has("attention_factor"):
        return fields.number("attention_factor")

    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if fields.fields.get("mscale") and fields.fields.get("mscale_all_dim"):
        return amplitude(fields.number("mscale")) / amplitude(fields.number("mscale_all_dim"))
    return amplitude(1.0)


def _longrope(base: _Base, fields: ConfigReader) -> tuple[Frequencies, float]:
    original = fields.integer("original_max_position_embeddings", default=base.max_position, low=2)
    factor = fields.number("factor", default=base.max_position / original)
    name = "long_factor" if base.max_position > original else "short_factor"
    stretch = np.array(fields.numbers(name, base.size // 2), dtype=np.float32)
    amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if fields.has("attention_factor"):
        amplitude = fields.number("attention_factor")
    return np.float32(1.0) / (stretch * base.powers()), amplitude


_SCALINGS: Mapping[str, Callable[[_Base, ConfigReader], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
