"""A graph for Model Explorer (github.com/google-ai-edge/model-explorer): layers that open and close."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from zgraph.ir import Graph, Value
from zgraph.viz.boxes import Box, boxes


def model_explorer(graph: Graph, title: str) -> Iterator[str]:
    """A graph in the JSON that Model Explorer reads without an adapter."""
    yield f'{{"label": {json.dumps(title)}, "graphs": [{{"id": {json.dumps(graph.name)}, "nodes": [\n'
    made: dict[str, tuple[str, int]] = {}
    for number, box in enumerate(boxes(graph)):
        yield (",\n" if number else "") + json.dumps(_node(box, made))
        made.update((value.name, (box.name, index)) for index, value in enumerate(box.makes))
    yield "\n]}]}\n"


def _node(box: Box, made: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    return {
        "id": box.name,
        "label": box.label,
        "namespace": "/".join(part.replace("/", "_") for part in box.scope),
        "attrs": _attributes({"lane": box.lane, **box.details} if box.lane else box.details),
        "incomingEdges": [_edge(index, *made[value.name]) for index, value in enumerate(box.reads)],
        "outputsMetadata": [_output(index, value) for index, value in enumerate(box.makes)],
        "style": {"backgroundColor": box.colour},
    }


def _edge(index: int, source: str, output: int) -> dict[str, str]:
    return {"sourceNodeId": source, "sourceNodeOutputId": str(output), "targetNodeInputId": str(index)}


def _output(index: int, value: Value) -> dict[str, Any]:
    """`tensor_shape` is what is written on edges."""
    return {"id": str(index), "attrs": _attributes({"name": f"%{value.name}", "tensor_shape": str(value.type)})}


def _attributes(texts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": text} for key, text in texts.items()]
