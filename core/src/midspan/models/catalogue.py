"""Which architectures there are, and the way from a config to its graph.

Knows builders by published class name; packages add more by the hook
``midspan_architectures``, whose result is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.graph.builder import GraphBuilder
from midspan.interface.graph import Graph
from midspan.models.llama import build_llama, build_mistral, build_qwen2, build_qwen3
from midspan.models.mixtures import (
    build_glm4_moe,
    build_gpt_oss,
    build_granite_moe,
    build_mixtral,
    build_olmoe,
    build_qwen2_moe,
    build_qwen3_moe,
)

ArchitectureBuilder = Callable[[Mapping[str, Any], GraphBuilder], Graph]
"""(published config, empty graph builder) -> the finished graph."""

BUILT_IN: Mapping[str, ArchitectureBuilder] = {
    "Glm4MoeForCausalLM": build_glm4_moe,
    "GptOssForCausalLM": build_gpt_oss,
    "GraniteMoeForCausalLM": build_granite_moe,
    "LlamaForCausalLM": build_llama,
    "MistralForCausalLM": build_mistral,
    "MixtralForCausalLM": build_mixtral,
    "OlmoeForCausalLM": build_olmoe,
    "Qwen2ForCausalLM": build_qwen2,
    "Qwen2MoeForCausalLM": build_qwen2_moe,
    "Qwen3ForCausalLM": build_qwen3,
    "Qwen3MoeForCausalLM": build_qwen3_moe,
}
"""Published class name -> builder."""


def known_architectures() -> tuple[str, ...]:
    """Published class names that the core builds, sorted."""
    return tuple(sorted(BUILT_IN))


def build_graph(config: Mapping[str, Any], *, architectures: Mapping[str, ArchitectureBuilder] | None = None) -> Graph:
    """The graph of a published config, before any pass.

    Args:
        config: content of ``config.json``.
        architectures: builders from installed packages; they win over the core's own.

    Raises:
        UnsupportedModel: no builder for any of the config's architectures; the message
            lists those that exist.
        CheckpointError: the config names none, or a field is missing or absurd.
    """
    names = config.get("architectures")
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "The model's config has no field 'architectures' with the model's class name.",
            remedy="Check that the folder holds a language model's config.json.",
        )
    builders = {**BUILT_IN, **(architectures or {})}
    for name in names:
        if name in builders:
            return builders[name](config, GraphBuilder(name))
    raise UnsupportedModel(
        f"The architecture {', '.join(names)} is not supported.",
        remedy=f"Supported architectures: {', '.join(sorted(builders))}. A plugin can add more.",
    )
