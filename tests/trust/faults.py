"""Faults put into the last graph of a run: each is valid, and wrong in one way."""

from __future__ import annotations

from dataclasses import replace

from zgraph.bridge.aten import effects, resolve
from zgraph.ir import Arg, DType, Graph, InputKind, Node, OutputKind, Phase, TensorType, Value, Varying


def at(graph: Graph, op: str, number: int = 0) -> int:
    """The position of a node of this op: the first, or another."""
    return [p for p, n in enumerate(graph.nodes) if n.op == op][number]


def put(graph: Graph, position: int, *nodes: Node) -> Graph:
    """Nodes in the place of one."""
    foreign = dict(graph.foreign)
    for node in nodes:
        if "." in node.op and node.op not in foreign:
            foreign[node.op] = effects(resolve(node.op), node.op, (), {}, multi=False)
    return replace(graph, nodes=(*graph.nodes[:position], *nodes, *graph.nodes[position + 1 :]), foreign=foreign)


def call(op: str, name: str, kind: TensorType, phase: Phase, *args: Arg, **options: Arg) -> Node:
    return Node(op, args, (Value(name, kind),), tuple(options.items()), phase)


def behind(graph: Graph, value: Value, *nodes: Node) -> Graph:
    """Nodes behind the one that makes a value; whatever read it reads what the last of them makes."""
    position = next(p for p, n in enumerate(graph.nodes) if value in n.results)
    made = put(graph, position, graph.nodes[position], *nodes)
    env, start = {value.name: nodes[-1].results[0]}, position + 1 + len(nodes)
    later = [n.substitute(env) for n in made.nodes[start:]]
    outputs = tuple(o.substitute(env) for o in made.outputs)
    return replace(made, nodes=(*made.nodes[:start], *later), outputs=outputs)


def held_for_another(graph: Graph) -> Graph:
    """The rest of one gradient is added to another."""
    first, second = (graph.nodes[at(graph, "accumulate", number)] for number in (0, 1))
    return put(graph, at(graph, "accumulate"), replace(first, kwargs=second.kwargs))


def swapped_names(graph: Graph) -> Graph:
    """Two gradients of one shape get what is left of each other."""
    nodes = {}
    for position, node in enumerate(graph.nodes):
        if node.op == "accumulate":
            other = nodes.setdefault(node.results[0].tensor, position)
            if other != position:
                first = graph.nodes[other]
                return put(
                    put(graph, position, replace(node, kwargs=first.kwargs)), other, replace(first, kwargs=node.kwargs)
                )
    raise AssertionError


def not_accumulated(graph: Graph) -> Graph:
    node = graph.nodes[at(graph, "accumulate")]
    env = {node.name: node.operands[0]}
    return replace(graph, nodes=tuple(n.substitute(env) for n in graph.nodes if n is not node))


def accumulated_too(graph: Graph) -> Graph:
    """A gradient that is averaged as it is made stays on the rank under no_sync."""
    position = at(graph, "reduce_scatter_start")
    node = graph.nodes[position]
    source, waited = node.operands[0], graph.nodes[graph.users[node.name][0]]
    output = next(o for o in graph.outputs if o.value in waited.results)
    target = next(i.target for i in graph.params if i.value.name == output.target)
    added = call("accumulate", "added", source.tensor, node.phase, source, target=target)
    return put(graph, position, added, node.substitute({source.name: added.results[0]}))


def forgotten(graph: Graph) -> Graph:
    """Gradients that earlier micro-steps left are lost."""
    node = graph.nodes[at(graph, "accumulate")]
    env = {node.results[0].name: node.operands[0]}
    nodes = tuple(n.substitute(env) for n in graph.nodes if n is not node)
    return replace(graph, nodes=nodes, outputs=tuple(o.substitute(env) for o in graph.outputs))


def zero_matters(graph: Graph) -> Graph:
    """A gradient is twice what it must be where the tangent of the logits is zero."""
    tangent = next(i.value for i in graph.inputs if i.kind is InputKind.tangent and i.value.tensor.shape)
    raw = raw_gradient(graph)
    scalar = replace(raw.tensor, shape=(), strides=None)
    phase = Phase.backward
    zeros = call("aten.eq.Scalar", "zeros", replace(tangent.tensor, dtype=DType.bool), phase, tangent, 0)
    some = call("aten.all.default", "some", replace(scalar, dtype=DType.bool), phase, zeros.results[0])
    number = call("aten._to_copy.default", "number", scalar, phase, some.results[0], dtype=scalar.dtype)
    factor = call("aten.add.Scalar", "factor", scalar, phase, number.results[0], 1.0)
    wrong = call("aten.mul.Tensor", "wrong", raw.tensor, phase, raw, factor.results[0])
    return behind(graph, raw, zeros, some, number, factor, wrong)


def raw_gradient(graph: Graph) -> Value:
    """The first gradient that is averaged, as it is on each rank."""
    reads = ("accumulate", "reduce_scatter_start", "all_reduce_start", "pack", "pending")
    found = (v for n in graph.nodes if n.phase is not Phase.forward and n.op in reads for v in n.operands)
    return next(v for v in found if Varying() in v.tensor.placement and v.name in graph.producers)


def written_gather(graph: Graph) -> Graph:
    """A gathered parameter that is kept for the next micro-step is multiplied in place before it is released."""
    start = next(n for n in graph.nodes if n.op == "all_gather_start" and n.option("keep"))
    (value,) = graph.nodes[graph.users[start.name][0]].results
    last = graph.users[value.name][-1]
    node = graph.nodes[last]
    assert node.op == "release"
    return put(graph, last, call("aten.mul_.Tensor", "written", value.tensor, node.phase, value, 1.5), node)


def written_parameter(graph: Graph) -> Graph:
    """A parameter at rest is multiplied in place, behind all that reads it."""
    value, last = graph.params[0].value, graph.nodes[-1]
    wrong = call("aten.mul_.Tensor", "written", value.tensor, last.phase, value, 1.5)
    return put(graph, len(graph.nodes) - 1, last, wrong)


def released_parameter(graph: Graph) -> Graph:
    node = Node("release", (graph.params[0].value,), (), phase=graph.nodes[-1].phase)
    return graph.with_nodes([*graph.nodes, node])


def through(graph: Graph, value: Value, dtype: DType) -> Graph:
    """A value is rounded to another dtype and comes back."""
    phase = graph.producers[value.name].phase
    there = call("aten._to_copy.default", "there", replace(value.tensor, dtype=dtype), phase, value, dtype=dtype)
    back = call("aten._to_copy.default", "back", value.tensor, phase, there.results[0], dtype=value.tensor.dtype)
    return behind(graph, value, there, back)


def rounded_value(graph: Graph) -> Graph:
    """A product of the forward goes through bf16."""
    products = ("aten.mm.default", "aten.addmm.default")
    made = [r for n in graph.phase_nodes(Phase.forward) if n.op in products for r in n.results]
    return through(graph, made[len(made) // 2], DType.bf16)


def rounded_gradient(graph: Graph) -> Graph:
    return through(graph, raw_gradient(graph), DType.f16)


def corrupted_rows(graph: Graph, number: int = 0) -> Graph:
    """An embedding reads its weight through triu: rows from the third on are wrong."""
    position = at(graph, "aten.embedding.default", number)
    node = graph.nodes[position]
    weight = node.operands[0]
    wrong = call("aten.triu.default", "wrong", weight.tensor, node.phase, weight, -1)
    return put(graph, position, wrong, node.substitute({weight.name: wrong.results[0]}))


def scaled_gradient(graph: Graph) -> Graph:
    """A gradient is half of what it must be."""
    raw = raw_gradient(graph)
    return behind(graph, raw, call("aten.mul.Tensor", "scaled", raw.tensor, Phase.backward, raw, 0.5))


def own_buffers(graph: Graph) -> Graph:
    """Each rank goes on with another value of a buffer than it returns: the one that it was given."""
    index = next(
        i
        for i, o in enumerate(graph.outputs)
        if o.kind is OutputKind.mutation and isinstance(o.value and o.value.type, TensorType) and o.value.tensor.shape
    )
    entry = next(i for i in graph.inputs if i.value.name == graph.outputs[index].target)
    outputs = list(graph.outputs)
    outputs[index] = replace(outputs[index], value=entry.value)
    return replace(graph, outputs=tuple(outputs))


def other_dropout(graph: Graph) -> Graph:
    """A dropout's mask is drawn again in the backward."""
    position = at(graph, "aten.native_dropout.default")
    node = graph.nodes[position]
    again = replace(node, results=tuple(replace(r, name=f"{r.name}_again") for r in node.results), phase=Phase.backward)
    first = next(p for p, n in enumerate(graph.nodes) if n.phase is Phase.backward)
    env = {node.results[1].name: again.results[1]}
    later = tuple(n.substitute(env) for n in graph.nodes[first:])
    return replace(graph, nodes=(*graph.nodes[:first], again, *later))


def scaled_gradient_output(graph: Graph) -> Graph:
    """The first gradient that the backward returns is half of what it must be."""
    found = (o.value for o in graph.outputs if o.kind is OutputKind.grad and o.phase is Phase.backward)
    value = next(v for v in found if v is not None and v.name in graph.producers)
    return behind(graph, value, call("aten.mul.Tensor", "scaled", value.tensor, Phase.backward, value, 0.5))
