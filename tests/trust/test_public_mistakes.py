"""Mistakes that other systems have made, each recreated as a fault of a compiled graph, and refused.

Two more are of ranks that differ, and have their tests on ranks: a hang where ranks trace different shapes (DeepSpeed
7611, `tests/distributed/test_ranks_differ.py`), and collectives in another order on one rank (PyTorch 189454,
`test_another_run_file_on_one_rank` in `tests/distributed/test_same_program.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.trust.subjects import run, steps
from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError
from zgraph.ir import ExternalOp, Graph, Node, OutputKind, Value, Varying

ZERO, ONE, THREE = "llama, stage 0", "llama, stage 1", "llama, stage 3"
AXES = "llama, stage 0, two axes"


def first(graph: Graph, *ops: str) -> int:
    return next(p for p, n in enumerate(graph.nodes) if n.op in ops)


def put(graph: Graph, position: int, *nodes: Node) -> Graph:
    return graph.with_nodes([*graph.nodes[:position], *nodes, *graph.nodes[position + 1 :]])


def instead(graph: Graph, position: int, nodes: list[Node], old: str, new: Value) -> Graph:
    """Nodes in the place of one; what is behind them reads a new value."""
    behind = [n.substitute({old: new}) for n in graph.nodes[position + 1 :]]
    outputs = tuple(o.substitute({old: new}) for o in graph.outputs)
    return replace(graph, nodes=(*graph.nodes[:position], *nodes, *behind), outputs=outputs)


def the_last_micro_batch_is_not_reduced(graph: Graph) -> Graph:
    """Gradients of earlier micro-batches are averaged; that of the last one is each rank's own (DeepSpeed 7985)."""
    position = first(graph, "accumulate")
    node = graph.nodes[position]
    raw = node.operands[0]
    index = next(
        i
        for i, o in enumerate(graph.outputs)
        if o.kind is OutputKind.grad and o.value and o.value.type.shape == raw.type.shape
    )
    outputs = list(graph.outputs)
    outputs[index] = replace(outputs[index], value=raw)
    return replace(graph, outputs=tuple(outputs))


def all_but_the_last_backward_are_dropped(graph: Graph) -> Graph:
    """Nothing of earlier micro-batches is added to what is reduced (DeepSpeed 7981)."""
    position = first(graph, "accumulate")
    node = graph.nodes[position]
    return instead(graph, position, [], node.name, node.operands[0])


def a_bucket_is_read_before_it_is_written(graph: Graph) -> Graph:
    """A gradient is added to where it lies after its reduction has started (DeepSpeed 8061)."""
    position, raw = next(
        (p, v)
        for p, n in enumerate(graph.nodes)
        if n.op == "reduce_scatter_start"
        for v in sources(graph, n.operands[0])
        if v.tensor.varies
    )
    start = graph.nodes[position]
    node = Node("aten.mul_.Scalar", (raw, 2), (Value(f"{raw.name}_late", raw.type),), (), start.phase)
    foreign = {**graph.foreign, "aten.mul_.Scalar": ExternalOp(views=(0,), writes=(0,))}
    return replace(put(graph, position, start, node), foreign=foreign)


def sources(graph: Graph, value: Value) -> Iterator[Value]:
    """Values whose memory a value is in, nearest first."""
    while (maker := graph.producers.get(value.name)) is not None and maker.op in ("pending", "accumulate"):
        (value,) = maker.operands
        yield value


def a_gradient_is_scaled_once_more(graph: Graph) -> Graph:
    """A mean over the ranks is divided by their number, too (DeepSpeed 8152)."""
    position = first(graph, "pending")
    raw = graph.nodes[position].operands[0]
    made = Value(f"{raw.name}_scaled", raw.type)
    node = Node("aten.div.Scalar", (raw, 2), (made,), (), graph.nodes[position].phase)
    foreign = {**graph.foreign, "aten.div.Scalar": ExternalOp()}
    reads = graph.nodes[position].substitute({raw.name: made})
    return replace(put(graph, position, node, reads), foreign=foreign)


def a_replicated_parameter_loses_its_reduction(graph: Graph) -> Graph:
    """Its gradient is averaged along one axis of the mesh, and is each rank's own along the other (torchtitan 4054)."""
    index = next(i for i, o in enumerate(graph.outputs) if o.kind is OutputKind.grad and o.value is not None)
    output = graph.outputs[index]
    kind = output.value.type
    wrong = replace(output.value, type=kind.at(Varying(), *kind.placement[1:]))
    nodes = [
        replace(n, results=tuple(wrong if r == output.value else r for r in n.results)).substitute({wrong.name: wrong})
        for n in graph.nodes
    ]
    outputs = tuple(o.substitute({wrong.name: wrong}) for o in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs)


def a_second_copy_is_reused_while_it_is_sent(graph: Graph) -> Graph:
    """The memory of what a gather still reads is given away (DeepSpeed 8186)."""
    position = next(
        p for p, n in enumerate(graph.nodes) if n.op == "all_gather_start" and n.operands[0].name in graph.producers
    )
    start = graph.nodes[position]
    return put(graph, position, start, Node("release", start.operands, (), (), start.phase))


def a_parameter_is_freed_while_in_use(graph: Graph) -> Graph:
    """A gathered parameter is released before the last op that reads it (DeepSpeed 7596)."""
    position = first(graph, "release")
    node = graph.nodes[position]
    used = max(p for p in graph.users[node.operands[0].name] if p < position)
    nodes = list(graph.nodes)
    nodes.insert(used, nodes.pop(position))
    return graph.with_nodes(nodes)


MISTAKES: list[tuple[Callable[[Graph], Graph], str, str]] = [
    (the_last_micro_batch_is_not_reduced, ZERO, r"grad of %\S+ is .*: it is pending, and must be reduced"),
    (all_but_the_last_backward_are_dropped, ZERO, r"gradient of \S+ is not what the graph before it computes"),
    (a_bucket_is_read_before_it_is_written, ONE, r"writes to %\S+ while \S+_start of %\S+ reads it"),
    (a_gradient_is_scaled_once_more, THREE, r"gradient of \S+ is not what the graph before it computes"),
    (a_replicated_parameter_loses_its_reduction, AXES, r"<V, R>"),
    (a_second_copy_is_reused_while_it_is_sent, THREE, r"releases %\S+ while all_gather_start of %\S+ reads it"),
    (a_parameter_is_freed_while_in_use, THREE, r"memory was released by release"),
]


@pytest.mark.parametrize(("mistake", "subject", "message"), MISTAKES, ids=[m.__name__ for m, _, _ in MISTAKES])
def test_it_is_refused(mistake, subject, message):
    found = steps(subject)
    graph = found[-1][1]
    with pytest.raises(VerifyError, match=rf"the graph after mine: (?s:.)*({message})"):
        certify([*found, ("mine", mistake(graph))], run(subject).context, since=len(found))
