"""Changes of a graph that was captured on a processor as on a GPU: names of devices, and types of statistics."""

from __future__ import annotations

from dataclasses import replace

from zgraph.ir import Arg, DType, Graph, Node, Token, Value
from zgraph.ir.graph import map_values

LAYER_NORM = "aten.native_layer_norm.default"
_HALF = (DType.bf16, DType.f16)


def on_gpu(graph: Graph) -> Graph:
    """The graph with the GPU in the place of the processor, and with the fp32 statistics that its layer norms give."""
    env: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        results = node.results
        if node.op == LAYER_NORM and results[0].tensor.dtype in _HALF:
            results = (results[0], *(_in_fp32(value) for value in results[1:]))
            env.update((value.name, value) for value in results[1:])
        args = tuple(_there(map_values(arg, env)) for arg in node.args)
        kwargs = tuple((name, _there(map_values(arg, env))) for name, arg in node.kwargs)
        nodes.append(replace(node, args=args, kwargs=kwargs, results=results))
    outputs = tuple(
        replace(o, value=env.get(o.value.name, o.value)) if o.value is not None else o for o in graph.outputs
    )
    return replace(graph, outputs=outputs).with_nodes(nodes)


def _in_fp32(value: Value) -> Value:
    return replace(value, type=replace(value.tensor, dtype=DType.f32))


def _there(arg: Arg) -> Arg:
    if isinstance(arg, Token) and arg.kind == "device" and arg.name == "cpu":
        return replace(arg, name="cuda")
    if isinstance(arg, Graph):
        return on_gpu(arg)
    return tuple(_there(item) for item in arg) if isinstance(arg, tuple) else arg
