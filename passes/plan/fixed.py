"""The part of a forward that is computed from the model alone, apart from that of a call's inputs.

    param %w: f32[32, 16] "layer.weight"                  graph of what is fixed
    input %x: f32[4, 16] "x"                                param %w: f32[32, 16] "layer.weight"
    fwd %t: f32[16, 32 | 1, 16] = aten.t.default(%w)  ->    fwd %t: f32[16, 32 | 1, 16] = aten.t.default(%w)
    fwd %y: f32[4, 32] = aten.mm.default(%x, %t)            return fwd output %t
    return fwd output %y                                  graph of a call
                                                            constant %t: f32[16, 32 | 1, 16] "aten.t.default:9a7d..."
                                                            input %x: f32[4, 16] "x"
                                                            fwd %y: f32[4, 32] = aten.mm.default(%x, %t)

The first graph is run once; the second at each call. Two graphs of one model that compute the same give it the same
name, so that one may use what the other has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from zgraph.ir import Arg, Graph, Input, InputKind, Node, Output, OutputKind, Value
from zgraph.ir.ops import is_pure


def split_fixed(graph: Graph) -> tuple[Graph, Graph]:
    """The graph of what depends on no input of a call, and the graph of the rest, which has its results as constants.

    Parameters, constants, and buffers that the graph does not change are fixed.

    Args:
        graph: a forward alone.
    """
    changed = {o.target for o in graph.outputs if o.kind is OutputKind.mutation}
    keys = {
        i.value.name: f"{i.kind.value} {i.target}: {i.value.type}"
        for i in graph.inputs
        if i.kind in (InputKind.param, InputKind.constant, InputKind.buffer) and i.value.name not in changed
    }
    fixed, rest = list[Node](), list[Node]()
    first: dict[str, Value] = {}
    same: dict[str, Value] = {}
    for node in graph.nodes:
        node = node.substitute(same)
        if not is_pure(graph, node) or any(v.name not in keys for v in node.operands):
            rest.append(node)
            continue
        for key, result in zip(_keys(node, keys), node.results, strict=True):
            keys[result.name] = key
            if first.setdefault(key, result) is not result:
                same[result.name] = first[key]
        fixed.append(node)
    outputs = tuple(o.substitute(same) for o in graph.outputs)
    made = {r.name for n in fixed for r in n.results}
    read = [v for n in rest for v in n.operands] + [o.value for o in outputs if o.value is not None]
    results = tuple(dict.fromkeys(v for v in read if v.name in made))
    used = {v.name for v in read} | changed
    constants = tuple(Input(InputKind.constant, v, keys[v.name]) for v in results)
    inputs = (*(i for i in graph.inputs if i.value.name in used), *constants)
    call = replace(graph, inputs=inputs, nodes=tuple(rest), outputs=outputs).with_used_ops()
    return _fixed(graph, fixed, results), call


def only(graph: Graph, wanted: Collection[int]) -> Graph:
    """The part of a graph that makes some of its results.

    Args:
        graph: the first that `split_fixed` gives.
        wanted: positions of the results.
    """
    return _fixed(graph, graph.nodes, tuple(o.value for i, o in enumerate(graph.outputs) if i in wanted and o.value))


def _fixed(graph: Graph, nodes: Iterable[Node], results: tuple[Value, ...]) -> Graph:
    """A graph of those nodes that are needed for these results."""
    needed, kept = {v.name for v in results}, list[Node]()
    for node in reversed([*nodes]):
        if any(r.name in needed for r in node.results):
            needed.update(v.name for v in node.operands)
            kept.append(node)
    return replace(
        graph,
        name=f"{graph.name.removesuffix('-fixed')}-fixed",
        inputs=tuple(i for i in graph.inputs if i.value.name in needed),
        nodes=tuple(kept[::-1]),
        outputs=tuple(Output(OutputKind.output, v) for v in results),
    ).with_used_ops()


def _keys(node: Node, keys: Mapping[str, str]) -> list[str]:
    """Names for what a node computes, from those of what it reads."""

    def text(arg: Arg) -> str:
        if isinstance(arg, Value):
            return keys[arg.name]
        return f"[{', '.join(map(text, arg))}]" if isinstance(arg, tuple) else repr(arg)

    given = [*map(text, node.args), *(f"{key}={text(arg)}" for key, arg in node.kwargs)]
    made = f"{node.op}({', '.join(given)}) -> {', '.join(str(r.type) for r in node.results)}"
    digest = hashlib.sha256(made.encode()).hexdigest()[:16]
    return [f"{node.op}:{digest}.{number}" for number in range(len(node.results))]
