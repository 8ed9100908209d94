"""Inverse frequencies and amplitudes equal those of transformers, for every scaling.

Both work in float32; powers may differ in their last bit, and one blend of two
numbers follows: 4 units in the last place, 5e-7 relative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from midspan.models.config_reader import ConfigReader
from midspan.models.rotary_scaling import read_rotary

SMALL = {"rope_theta": 10000.0}
LARGE = {"rope_theta": 500000.0}
FACTORS = {"long_factor": [1.0 + index / 5 for index in range(16)], "short_factor": [1.05] * 16}

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **LARGE},
    "linear": {"rope_type": "linear", "factor": 4.0, **SMALL},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **SMALL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **LARGE,
    },
    "llama3, other band": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 7.0,
        "original_max_position_embeddings": 1024,
        **LARGE,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, **LARGE},
    "yarn, other band": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
        **SMALL,
    },
    "yarn, stated amplitude": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.8,
        **SMALL,
    },
    "yarn, amplitude weights": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        **SMALL,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 32.0, **FACTORS, **SMALL},
    "longrope, stated amplitude": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "attention_factor": 1.3,
        **FACTORS,
        **SMALL,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_amplitude_equal_transformers(case: str) -> None:
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(CASES[case])
    )
    kind = CASES[case]["rope_type"]
    if kind == "default":
        frequencies, amplitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, seq_len=131072)

    rotary = read_rotary(ConfigReader(config.to_dict()), head_size=32, max_position=131072)

    assert rotary.rotary_size == 32
    np.testing.assert_allclose(rotary.inverse_frequencies, frequencies.numpy(), rtol=5e-7, atol=0)
    assert rotary.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_longrope_of_a_model_that_was_not_stretched_takes_the_short_factors() -> None:
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **FACTORS, **SMALL}
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(scaling)
    )
    frequencies, amplitude = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=4096)
    rotary = read_rotary(ConfigReader(config.to_dict()), head_size=32, max_position=4096)
    np.testing.assert_allclose(rotary.inverse_frequencies, frequencies.numpy(), rtol=5e-7, atol=0)
    assert rotary.amplitude == amplitude == 1.0
