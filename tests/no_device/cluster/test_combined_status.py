"""Several engines told as one: sums, the least limit, the fullest cache."""

from __future__ import annotations

from typing import Any

from midspan.cluster.combined_status import combined_model, combined_statistics
from midspan.engine.status import EngineStatistics, ModelInfo


def model(**changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "name": "tiny",
        "path": "/tiny",
        "architecture": "LlamaForCausalLM",
        "max_model_len": 256,
        "vocab_size": 320,
        "dtype": "float32",
        "cache_dtype": "float32",
        "device": "one",
        "device_description": "the first",
        "device_choice": "Device one, as asked.",
        "weights_bytes": 10,
        "cache_bytes": 100,
        "cache_tokens": 1000,
        "block_size": 16,
        "max_num_seqs": 8,
        "max_logprobs": 20,
        "created": 1,
        "placement": {"linear": ("numpy",)},
    }
    return ModelInfo(**{**fields, **changes})


def test_limits_are_the_least_and_sizes_are_sums() -> None:
    other = model(
        max_model_len=128,
        max_logprobs=5,
        device="two",
        dtype="bfloat16",
        placement={"linear": ("fast",), "add": ("fast",)},
    )
    both = combined_model([model(), other])
    assert (both.max_model_len, both.max_logprobs) == (128, 5)
    assert (both.weights_bytes, both.cache_bytes, both.cache_tokens, both.max_num_seqs) == (20, 200, 2000, 16)
    assert both.device == "one + two"
    assert (both.dtype, both.cache_dtype) == ("float32 + bfloat16", "float32")
    assert both.placement == {"linear": ("numpy", "fast"), "add": ("fast",)}
    assert combined_model([model()]) == model()


def test_counters_are_summed_and_the_fullest_cache_is_told() -> None:
    one = EngineStatistics(
        running=1, waiting=2, generation_tokens=5, cache_usage=0.25, finished={"stop": 2}, restarts=1
    )
    two = EngineStatistics(running=3, generation_tokens=7, cache_usage=0.75, finished={"stop": 1, "length": 4})
    both = combined_statistics([one, two])
    assert (both.running, both.waiting, both.generation_tokens, both.restarts) == (4, 2, 12, 1)
    assert both.cache_usage == 0.75
    assert both.finished == {"stop": 3, "length": 4}
    assert combined_statistics([one]) == one
