"""The printed form: one line a node, stable, with shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midspan.graph.passes import apply_passes
from midspan.graph.printing import format_graph
from midspan.models.catalogue import build_graph

GOLDEN = Path(__file__).with_name("tiny_llama_after_all_passes.txt")


def _tiny(tiny_config: Any) -> dict[str, Any]:
    config: dict[str, Any] = tiny_config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return config


def test_the_print_of_a_small_model_is_as_in_the_file_beside_this_one(tiny_config: Any) -> None:
    assert format_graph(apply_passes(build_graph(_tiny(tiny_config)))) == GOLDEN.read_text()


def test_each_node_has_one_line_and_long_tuples_are_cut(tiny_config: Any) -> None:
    graph = build_graph(tiny_config(head_dim=64))
    lines = format_graph(graph).splitlines()
    assert sum(" = " in line for line in lines) == len(graph.nodes)
    rotary = next(line for line in lines if "= rotary(" in line)
    assert "32 items" in rotary
    assert max(map(len, lines)) < 300
