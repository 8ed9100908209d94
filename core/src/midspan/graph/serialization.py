"""A graph as JSON and back, without loss.

Numbers keep their bits and their kind (1 and 1.0 differ), tuples come back as
tuples. What is read is validated, so a damaged file is an error and not a graph.
Knows no operation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from midspan.errors import GraphError
from midspan.graph.validation import validate
from midspan.interface.cache import CacheGroup
from midspan.interface.graph import Graph, Node, Value, Weight

FORMAT = "midspan.graph/1"
"""Names the format and its version in each file."""

Record = TypeVar("Record", Value, Weight, Node, CacheGroup)

_REMEDY = "Write the graph again with this release."


def graph_to_json(graph: Graph) -> str:
    """The graph as a JSON object; equal graphs give equal text."""
    content = {
        "format": FORMAT,
        "name": graph.name,
        "architecture": graph.architecture,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.hidden_size,
        "max_position": graph.max_position,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "cache": [asdict(group) for group in graph.cache],
        "values": [asdict(value) for value in graph.values.values()],
        "weights": [asdict(weight) for weight in graph.weights.values()],
        "nodes": [asdict(node) for node in graph.nodes],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def graph_from_json(text: str) -> Graph:
    """The graph that ``graph_to_json`` wrote.

    Raises:
        GraphError: the text is no such graph, or an invalid one.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise GraphError(f"the text is no JSON: {error}", remedy=_REMEDY) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GraphError(f"the text is no graph in the format '{FORMAT}'", remedy=_REMEDY)
    try:
        graph = _read_graph(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GraphError(f"the graph is damaged: {error!r}", remedy=_REMEDY) from error
    validate(graph)
    return graph


def _read_graph(content: Mapping[str, Any]) -> Graph:
    values = [_read(Value, item) for item in content["values"]]
    weights = [_read(Weight, item) for item in content["weights"]]
    return Graph(
        name=_expect(content["name"], str),
        architecture=_expect(content["architecture"], str),
        inputs=tuple(content["inputs"]),
        outputs=tuple(content["outputs"]),
        values={value.name: value for value in values},
        weights={weight.name: weight for weight in weights},
        nodes=tuple(_read(Node, item) for item in content["nodes"]),
        cache=tuple(_read(CacheGroup, item) for item in content["cache"]),
        vocab_size=_expect(content["vocab_size"], int),
        hidden_size=_expect(content["hidden_size"], int),
        max_position=_expect(content["max_position"], int),
    )


def _read(kind: type[Record], item: Mapping[str, Any]) -> Record:
    names = {field.name for field in fields(kind)}
    if set(item) != names:
        raise ValueError(f"a {kind.__name__} has the fields {sorted(names)}, not {sorted(item)}")
    return kind(**{name: _thaw(value) for name, value in item.items()})


def _thaw(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_thaw(item) for item in value)
    if isinstance(value, dict):
        return {name: _thaw(item) for name, item in value.items()}
    return value


def _expect(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
