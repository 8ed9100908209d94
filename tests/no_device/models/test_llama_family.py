"""Published configs of the Llama family give the right graphs, and bad ones an error that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.graph.validation import validate
from midspan.interface import Graph
from midspan.models.catalogue import build_graph, known_architectures


def _windows(graph: Graph) -> list[int | None]:
    return [node.attributes["window"] for node in graph.nodes if node.op == "attention"]  # type: ignore[misc]


def _architecture(kind: str) -> dict[str, Any]:
    return {"architectures": [f"{kind}ForCausalLM"]}


FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def test_the_known_architectures_are_listed_in_order() -> None:
    assert set(FAMILY) <= set(known_architectures())
    assert list(known_architectures()) == sorted(known_architectures())


@pytest.mark.parametrize("architecture", FAMILY)
def test_every_architecture_gives_a_valid_graph_with_published_weight_names(
    architecture: str, tiny_config: Any
) -> None:
    graph = build_graph(tiny_config(architectures=[architecture]))
    validate(graph)
    assert graph.architecture == architecture
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(graph.weights)
    assert "model.layers.1.mlp.down_proj.weight" in graph.weights


def test_llama_without_key_value_heads_has_as_many_as_query_heads(tiny_config: Any) -> None:
    assert build_graph(tiny_config(num_key_value_heads=None)).cache[0].kv_heads == 4


def test_head_dim_may_differ_from_hidden_size_over_heads(tiny_config: Any) -> None:
    graph = build_graph(tiny_config(head_dim=24))
    assert graph.cache[0].key_size == 24
    assert graph.weights["model.layers.0.self_attn.q_proj.weight"].shape == (96, 32)
    assert graph.weights["model.layers.0.self_attn.o_proj.weight"].shape == (32, 96)


def test_qwen3_without_head_dim_has_the_published_default(tiny_config: Any) -> None:
    assert build_graph(tiny_config(**_architecture("Qwen3"))).cache[0].key_size == 128


def test_tied_embeddings_have_one_weight(tiny_config: Any) -> None:
    graph = build_graph(tiny_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in graph.weights
    assert next(node for node in graph.nodes if node.op == "logits").weights == {"weight": "model.embed_tokens.weight"}


BIASES = {
    "Llama": ({}, set()),
    "Llama with attention_bias": ({"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "Llama with mlp_bias": ({"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}),
    "Mistral": ({"attention_bias": True}, set()),
    "Qwen2": ({}, {"q_proj", "k_proj", "v_proj"}),
    "Qwen3": ({}, set()),
    "Qwen3 with attention_bias": ({"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
}


@pytest.mark.parametrize("case", BIASES)
def test_biases_stand_where_the_architecture_has_them(case: str, tiny_config: Any) -> None:
    fields, expected = BIASES[case]
    graph = build_graph(tiny_config(**_architecture(case.split()[0]), **fields))
    assert {name.split(".")[-2] for name in graph.weights if name.endswith(".bias")} == expected


def test_mistral_windows_hold_for_all_layers_and_null_means_none(tiny_config: Any) -> None:
    mistral = _architecture("Mistral")
    assert _windows(build_graph(tiny_config(**mistral, sliding_window=16))) == [16, 16]
    assert _windows(build_graph(tiny_config(**mistral, sliding_window=None))) == [None, None]


def test_a_window_as_long_as_the_model_is_no_window(tiny_config: Any) -> None:
    assert _windows(build_graph(tiny_config(**_architecture("Mistral"), sliding_window=256))) == [None, None]


def test_qwen_windows_follow_the_switch_and_the_first_layer(tiny_config: Any) -> None:
    qwen = tiny_config(**_architecture("Qwen2"), num_hidden_layers=4, sliding_window=16, max_window_layers=3)
    assert _windows(build_graph(qwen)) == [None] * 4
    graph = build_graph({**qwen, "use_sliding_window": True})
    assert _windows(graph) == [None, None, None, 16]
    assert [(group.name, group.layers) for group in graph.cache] == [("full", 3), ("window.16", 1)]


def test_layer_types_say_which_layers_have_windows(tiny_config: Any) -> None:
    types = ["sliding_attention", "full_attention"]
    config = tiny_config(**_architecture("Qwen3"), use_sliding_window=True, sliding_window=16, layer_types=types)
    assert _windows(build_graph(config)) == [16, None]


def test_llama_takes_no_notice_of_a_sliding_window(tiny_config: Any) -> None:
    assert _windows(build_graph(tiny_config(sliding_window=16))) == [None, None]


def _frequencies(graph: Graph) -> Any:
    return next(node for node in graph.nodes if node.op == "rotary").attributes["inverse_frequencies"]


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_old_and_new_ways_to_write_rotary_settings_are_the_same(tiny_config: Any) -> None:
    old = tiny_config(rope_theta=5e5, rope_scaling=SCALING)
    new = tiny_config(rope_parameters={**SCALING, "rope_theta": 5e5})
    del new["rope_theta"]
    assert _frequencies(build_graph(old)) == _frequencies(build_graph(new))
    assert _frequencies(build_graph(old)) != _frequencies(build_graph(tiny_config(rope_theta=5e5)))


def test_the_oldest_name_of_the_scaling_type_is_understood(tiny_config: Any) -> None:
    plain = _frequencies(build_graph(tiny_config()))
    scaled = _frequencies(build_graph(tiny_config(rope_scaling={"type": "linear", "factor": 2.0})))
    assert scaled == pytest.approx([value / 2 for value in plain])


def test_a_builder_from_elsewhere_is_used_and_wins(tiny_config: Any) -> None:
    def build(config: Any, g: Any) -> Graph:
        g.sample(g.logits(g.rows_to_sample(g.embedding(g.token_ids, "embed", 11, 8)), "head", 11))
        finished: Graph = g.finish(max_position=8)
        return finished

    added = {"FooForCausalLM": build, "LlamaForCausalLM": build}
    assert build_graph({"architectures": ["FooForCausalLM"]}, architectures=added).architecture == "FooForCausalLM"
    assert len(build_graph(tiny_config(), architectures=added).nodes) == 4


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="GPT9ForCausalLM") as caught:
        build_graph({"architectures": ["GPT9ForCausalLM"]})
    assert all(name in caught.value.remedy for name in known_architectures())


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3]])
def test_a_config_without_architectures_is_an_error(value: Any) -> None:
    with pytest.raises(CheckpointError, match="architectures"):
        build_graph({"architectures": value})


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("name", [*REQUIRED, "max_position_embeddings"])
def test_a_missing_field_is_named(name: str, tiny_config: Any) -> None:
    config = tiny_config()
    del config[name]
    with pytest.raises(CheckpointError, match=name):
        build_graph(config)


ABSURD: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": "wide"},
    "vocab_size": {"vocab_size": -5},
    "num_hidden_layers": {"num_hidden_layers": 0},
    "field 'num_hidden_layers'": {"num_hidden_layers": 60000},
    "intermediate_size": {"intermediate_size": 2.5},
    "max_position_embeddings": {"max_position_embeddings": 2**40},
    "num_attention_heads": {"num_attention_heads": True},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "head_dim": {"hidden_size": 33},
    "rms_norm_eps": {"rms_norm_eps": float("nan")},
    "tie_word_embeddings": {"tie_word_embeddings": "yes"},
    "rope_theta": {"rope_theta": 0},
    "rope_scaling.factor": {"rope_scaling": {"rope_type": "linear"}},
    "rope_scaling": {"rope_scaling": "linear"},
    "high_freq_factor": {"rope_scaling": {**SCALING, "high_freq_factor": 1.0}},
    "long_factor": {
        "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64, "long_factor": [1.0, 2.0]}
    },
    "original_max_position_embeddings": {"rope_scaling": {**SCALING, "original_max_position_embeddings": "64"}},
    "it must be even": {"head_dim": 7},
    "sliding_window": {**_architecture("Mistral"), "sliding_window": 0},
    "layer_types": {
        **_architecture("Qwen2"),
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention"],
    },
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_field_is_named(name: str, tiny_config: Any) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        build_graph(tiny_config(**ABSURD[name]))
    assert caught.value.remedy


UNKNOWN: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "mish"},
    "rope_scaling.rope_type": {"rope_scaling": {"rope_type": "spiral"}},
    "layer_types": {
        **_architecture("Qwen2"),
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "linear_attention"],
    },
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_choice_that_is_not_known_is_refused_with_the_known_ones(name: str, tiny_config: Any) -> None:
    with pytest.raises(UnsupportedModel, match=name) as caught:
        build_graph(tiny_config(**UNKNOWN[name]))
    assert "Known" in caught.value.remedy
