"""Gradients and buffers that are reduced wrongly, twice or not at all are refused by types alone, without numbers."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import zgraph
from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError
from zgraph.ir import Axis, Graph, Node, OutputKind, Phase, Value, parse_graph, print_graph, verify
from zgraph.ir.ops import OPS
from zgraph.passes import RECIPES, Context, parse_recipe

MESHES = {"line": (Axis("shard", 2),), "rows": (Axis("replicate", 2), Axis("shard", 2))}


class Net(nn.Module):
    """Two layers with statistics between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu()).square().mean()


@cache
def captured(offload: str = "") -> Graph:
    graph = zgraph.trace(Net(), torch.rand(4, 8))
    inputs = tuple(replace(i, offload=offload) if i.kind.value == "param" else i for i in graph.inputs)
    return replace(graph, inputs=inputs)


@cache
def final(stage: int, mesh: str = "line", offload: str = "", num_passes: int = 100) -> Graph:
    """The graph after all passes, or after the first few of them."""
    pipeline = parse_recipe(RECIPES[stage])
    pipeline = replace(pipeline, passes=pipeline.passes[:num_passes])
    return pipeline.run(captured(offload), Context(mesh=MESHES[mesh]))


def refused(graph: Graph, rule: str) -> str:
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert str(caught.value).startswith(f"[{rule}] "), str(caught.value)
    return str(caught.value)


def reads(graph: Graph, op: str, other: str) -> Graph:
    """The graph with the last node of one op as that of another."""
    at = max(p for p, n in enumerate(graph.nodes) if n.op == op)
    return graph.with_nodes([replace(n, op=other) if p == at else n for p, n in enumerate(graph.nodes)])


def other_reduction(graph: Graph, reduction: str, other: str) -> Graph:
    """The text with one reduction for another wherever it is told."""
    text = print_graph(graph).replace(f"P({reduction})", f"P({other})")
    return parse_graph(text.replace(f'reduce="{reduction}"', f'reduce="{other}"'))


def gradient(graph: Graph) -> tuple[int, Value]:
    """A gradient: its place among the outputs, and its value."""
    params = graph.param_names
    found = [(i, o) for i, o in enumerate(graph.outputs) if o.kind is OutputKind.grad and o.target in params]
    return next((i, o.value) for i, o in found if o.value is not None)


def returning(graph: Graph, index: int, value: Value) -> Graph:
    outputs = list(graph.outputs)
    outputs[index] = replace(outputs[index], value=value)
    return replace(graph, outputs=tuple(outputs))


def behind(graph: Graph, value: Value, *ops: str) -> Node:
    """The node of one of these ops that a value was made by, some nodes back."""
    node = graph.producers[value.name]
    while node.op not in ops:
        node = graph.producers[node.operands[0].name]
    return node


stages = pytest.mark.parametrize("stage", range(4))
meshes = pytest.mark.parametrize("mesh", MESHES)


@stages
@meshes
@pytest.mark.parametrize("offload", ["", "optimizer"])
def test_what_the_passes_make_is_valid_after_each_of_them(stage, mesh, offload):
    for num_passes in range(1, len(parse_recipe(RECIPES[stage]).passes) + 1):
        verify(final(stage, mesh, offload, num_passes))


@stages
@meshes
def test_a_mean_is_no_broadcast_and_a_broadcast_no_mean(stage, mesh):
    graph = final(stage, mesh)
    refused(reads(graph, "broadcast_start", "all_reduce_start"), "types")
    if stage == 0:
        refused(reads(graph, "all_reduce_start", "broadcast_start"), "types")
    else:
        refused(reads(graph, "reduce_scatter_start", "broadcast_start"), "types")


@stages
def test_mean_and_root_cannot_change_places(stage):
    graph = final(stage)
    refused(other_reduction(graph, "mean", "root"), "types")
    refused(other_reduction(graph, "root", "mean"), "types")


@stages
@meshes
@pytest.mark.parametrize("num_passes", [2, 100])
def test_a_mean_made_a_sum_is_another_term(stage, mesh, num_passes):
    """Types alone cannot know which of the two was meant: the captured graph does."""
    graph = other_reduction(final(stage, mesh, num_passes=num_passes), "mean", "sum")
    verify(graph)
    with pytest.raises(VerifyError, match=r"\[equality\] .* makes that the gradient of"):
        certify([("captured", captured()), ("partition", graph)], Context(mesh=graph.mesh))


@stages
@meshes
def test_a_gradient_that_is_not_reduced_is_refused(stage, mesh):
    graph = final(stage, mesh, num_passes=2)
    index, value = gradient(graph)
    pending = behind(graph, value, "pending")
    assert "it is pending, and must be reduced" in refused(returning(graph, index, pending.results[0]), "targets")
    assert "must lie as" in refused(returning(graph, index, pending.operands[0]), "targets")


@stages
@meshes
@pytest.mark.parametrize("num_passes", [2, 100])
def test_a_gradient_cannot_be_reduced_twice(stage, mesh, num_passes):
    """Neither is a reduced one pending, nor can it be made so."""
    graph = final(stage, mesh, num_passes=num_passes)
    index, value = gradient(graph)
    phase = graph.outputs[index].phase
    made = Value("twice", value.type)
    if num_passes == 2:
        refused(appended(graph, index, Node("reshard", (value,), (made,), phase=phase)), "types")
    else:
        start = "reduce_scatter_start" if stage else "all_reduce_start"
        promise = Value("promise", value.tensor.promised())
        nodes = Node(start, (value,), (promise,), phase=phase), Node("wait", (promise,), (made,), phase=phase)
        refused(appended(graph, index, *nodes), "types")
    again = Value("again", behind(graph, value, "pending").results[0].type)
    node = Node("pending", (value,), (again,), (("reduce", "mean"),), phase)
    refused(appended(graph, index, node), "types")


def appended(graph: Graph, index: int, *nodes: Node) -> Graph:
    """The graph with nodes behind what it returns there, whose last result it returns instead."""
    at = 1 + max(p for p, n in enumerate(graph.nodes) if n.phase.rank <= nodes[0].phase.rank)
    more = graph.with_nodes([*graph.nodes[:at], *nodes, *graph.nodes[at:]])
    return returning(more, index, nodes[-1].results[0])


def test_a_gradient_that_is_reduced_twice_by_way_of_a_copy_is_another_term():
    """Of what is alike on all ranks each may take its own, so that types allow it; it is another term all the same."""
    graph = final(0, num_passes=2)
    index, value = gradient(graph)
    phase = graph.outputs[index].phase
    varies, pending = behind(graph, value, "pending").operands[0].type, behind(graph, value, "pending").results[0].type
    own, again, made = Value("own", varies), Value("again", pending), Value("twice", value.type)
    nodes = (
        Node("copy", (value,), (own,), phase=phase),
        Node("pending", (own,), (again,), (("reduce", "mean"),), phase),
        Node("reshard", (again,), (made,), phase=phase),
    )
    twice = appended(graph, index, *nodes)
    verify(twice)
    with pytest.raises(VerifyError, match=r"\[equality\]"):
        certify([("captured", captured()), ("partition", twice)], Context(mesh=twice.mesh))


@stages
def test_a_gradient_lies_where_its_master_does(stage):
    graph = final(stage, offload="optimizer")
    index, value = gradient(graph)
    assert value.tensor.is_on_host
    start = graph.producers[graph.producers[value.name].operands[0].name]
    message = refused(returning(graph, index, start.operands[0]), "targets")
    assert "its master is the host's" in message
    params = {i.value.name for i in graph.params}
    here = replace(graph, inputs=tuple(replace(i, offload="") if i.value.name in params else i for i in graph.inputs))
    assert "its master is the device's" in refused(here, "targets")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_before_graphs_are_placed_gradients_lie_where_they_are_made(num_ranks):
    """Also of parameters that are offloaded and have a stage of their own."""
    inputs = tuple(replace(i, stage=2) if i.kind.value == "param" else i for i in captured("optimizer").inputs)
    steps = [("captured", replace(captured("optimizer"), inputs=inputs))]
    for step in parse_recipe("canonicalize,partition,broadcast,all-gather,reduce-scatter,host-copies,release").passes:
        steps.append((step.name, step.run(steps[-1][1], Context(mesh=MESHES["line"][: num_ranks - 1]))))
    certify(steps, Context(mesh=MESHES["line"][: num_ranks - 1]))


@stages
@meshes
def test_a_buffer_is_the_first_ranks_on_all(stage, mesh):
    graph = final(stage, mesh, num_passes=2)
    names = {i.value.name for i in graph.inputs if i.kind.value == "buffer"}
    index, value = next(
        (i, o.value)
        for i, o in enumerate(graph.outputs)
        if o.kind is OutputKind.mutation and o.target in names and o.value and behind_reshard(graph, o.value)
    )
    pending = behind(graph, value, "pending")
    assert str(pending.results[0].tensor.placement[-1]) == "P(root)"
    assert "pending" in refused(returning(graph, index, pending.results[0]), "targets")
    assert "must lie as" in refused(returning(graph, index, pending.operands[0]), "targets")


def behind_reshard(graph: Graph, value: Value) -> bool:
    return value.name in graph.producers and graph.producers[value.name].op == "reshard"


@meshes
def test_what_is_held_back_is_pending(mesh):
    """Micro-steps add up what the mean will be taken of; neither a value of one rank nor what is reduced."""
    graph = final(0, mesh, num_passes=2)
    added = [n for n in graph.nodes if n.op == "accumulate"]
    assert added
    assert {n.operands[0].tensor.reduction for n in added} == {"mean"}
    at = graph.nodes.index(added[0])
    raw = behind(graph, added[0].operands[0], "pending").operands[0]
    varying = replace(added[0], args=(raw,), results=(replace(added[0].results[0], type=raw.type),))
    after = [n.substitute({varying.name: varying.results[0]}) for n in graph.nodes[at + 1 :]]
    changed = graph.with_nodes([*graph.nodes[:at], varying, *after])
    assert "accumulate: its operand must be placed" in refused(changed, "types")


def test_no_op_of_a_model_reads_what_is_pending():
    graph = final(2, num_passes=2)
    pending = next(n for n in graph.nodes if n.op == "pending" and n.phase is Phase.backward)
    assert not [n for n in graph.readers(*pending.results) if n.op not in OPS]
    foreign = next(n for n in graph.nodes if n.op not in OPS and len(n.operands) == 1 and not n.kwargs)
    made = Value("read", pending.operands[0].type)
    node = replace(foreign, args=(pending.results[0],), results=(made,), phase=Phase.backward)
    assert "sharded or partial operand" in refused(graph.with_nodes([*graph.nodes, node]), "placements")
