"""What is worked out of single ops: what fuses, what has eight bits, and what becomes of ops that nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.passes.programs import Case, context_of, graph_of
from tests.passes.workings.common import outcome, passed, placed
from zgraph.cost import CostTable, hardware
from zgraph.ir import ExternalOp, Graph, Output, OutputKind, Phase, Value
from zgraph.passes import Context, make_plan, parse_recipe
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import lowered
from zgraph.passes.float8 import Float8
from zgraph.passes.fusion.groups import Groups
from zgraph.passes.fusion.loss import fused_losses, loss_nodes
from zgraph.passes.fusion.rotary import fused_subgraphs
from zgraph.passes.offload import Saved
from zgraph.passes.partition import Partition
from zgraph.passes.plan.fixed import only, split_fixed
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents
from zgraph.passes.quantise import Quantise


def forward_of(graph: Graph) -> Graph:
    """The forward alone."""
    return replace(
        graph,
        inputs=tuple(i for i in graph.inputs if i.kind.value != "tangent"),
        nodes=tuple(n for n in graph.nodes if n.phase is Phase.forward),
        outputs=tuple(o for o in graph.outputs if o.phase is Phase.forward and o.kind is OutputKind.output),
    ).with_used_ops()


def eights(name: str) -> Iterator[Any]:
    """Matrices in eight bits and less."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for recipe in ("tensorwise", "rowwise"):
        for exclude in ("lm_head", "none", "fc2+up"):
            found = Float8(recipe=recipe, exclude=exclude)
            yield found.layers(graph), found.left_out(graph), found.run(graph, Context())
    alone = forward_of(graph)
    for options in (
        {},
        {"activations": "int8"},
        {"activations": "int8", "precise": "up+q_proj"},
        {"weights": "int4", "group": 32},
        {"weights": "int4", "group": 64},
        {"weights": "int4", "group": 32, "wider": "first+lm_head+v_proj"},
    ):
        made = Quantise(**options)
        yield outcome(lambda m=made: m.layers(alone)), outcome(lambda m=made: m.run(alone, Context()))
        yield outcome(lambda m=made: parts_of(m.run(alone, Context())))


def parts_of(graph: Graph) -> tuple[Graph, ...]:
    """What depends on parameters alone, the rest, and parts of the former."""
    fixed, call = split_fixed(graph)
    return fixed, call, only(fixed, {0}), only(fixed, {len(fixed.outputs) - 1})


def grown(name: str) -> Iterator[Any]:
    """Groups of ops that can be kernels, and what may stand in their place."""
    context = replace(
        context_of(Case(name, "", ()), graph_of(name)), costs=CostTable(hardware=hardware("h100"), per_host=1)
    )
    graph = parse_recipe("canonicalize").run(graph_of(name), context)
    for matmuls in ("never", "auto", "always"):
        for found in Groups(graph, "fuse").candidates(matmuls, context.hints):
            yield found.key, sorted(found.nodes), [repr(nodes) for nodes in found.nodes.values()]
            yield found.best(context, matmuls), found.best(context, matmuls, only_measured=True)
        for only_measured in ("true", "false"):
            recipe = parse_recipe(f"canonicalize,fuse(matmuls={matmuls},only_measured={only_measured})")
            yield recipe.run(graph_of(name), context)


def varied(graph: Graph, *, rows: tuple[ExternalOp, ...] = (ExternalOp(),)) -> Iterator[Graph]:
    """The graph with another reader of each value, and with another op in the place of each node.

    Args:
        graph: the graph.
        rows: what is known of the other op; of what it writes to or views, the first argument if that is a value.
    """
    for node in graph.nodes:
        if any(v.name in graph.param_names for v in node.results) or not node.results:
            continue
        for value in node.results:
            yield replace(graph, outputs=(*graph.outputs, Output(OutputKind.output, value, "", node.phase)))
        op, is_single = "test.other.default", bool(node.args) and isinstance(node.args[0], Value)
        for row in rows:
            if (row.writes or row.views) and not is_single:
                continue
            nodes = tuple(replace(n, op=op) if n is node else n for n in graph.nodes)
            foreign = {**graph.foreign, op: replace(row, multi=len(node.results) > 1)}
            yield replace(graph, nodes=nodes, foreign=foreign)


def new_nodes(before: Graph, after: Graph) -> list[Any]:
    """What a pass made, and how many nodes there are."""
    old = set(map(id, before.nodes))
    return [len(after.nodes), *(repr(n) for n in after.nodes if id(n) not in old)]


def matched(name: str) -> Iterator[Any]:
    """What is found to fuse where a graph is a little different."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for other in varied(graph):
        yield new_nodes(other, fused_losses(other, "fuse")), new_nodes(other, fused_subgraphs(other, "fuse"))
        yield sorted(loss_nodes(other))


def layered(name: str) -> Iterator[Any]:
    """Which layers have eight bits, and what carries zeros alone, where a graph is a little different."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    zeros = zero_tangents(graph) or frozenset(i.value.name for i in graph.inputs if i.kind.value == "tangent")
    for other in varied(graph):
        yield Float8().layers(other), Float8().left_out(other), Quantise().layers(other)
        found = without_tangents(other, zeros)
        yield None if found is None else [len(found.nodes), found.outputs]


ROWS = (
    ExternalOp(random=True),
    ExternalOp(opaque=True),
    ExternalOp(writes=(0,)),
    ExternalOp(views=(0,)),
)


def odd(name: str, stage: int) -> Iterator[Any]:
    """What becomes of graphs with ops of which nothing else is known."""
    whole = parse_recipe("canonicalize").run(graph_of(name), Context())
    context = placed(name, stage)[1]
    for other in varied(whole, rows=ROWS):

        def found(other: Graph = other) -> Any:
            graph = passed("dce", Partition(stage).run(other, context), context)
            forward, saved = Forward(graph, context), Saved(graph, context, 1)
            again = [[(m.us, m.runs_again) for m in block.makers] for block, _ in forward.blocks]
            step = lowered(graph, context)
            transfers = [(t.first, t.due, t.num_bytes) for t in step.transfers]
            plan = make_plan(graph, only_step=True)
            return [new_nodes(other, graph), again, saved.num_bytes, transfers, plan.saved, step.canonical().nodes]

        yield outcome(found)
        yield outcome(
            lambda graph=other: [(c.key, sorted(c.nodes)) for c in Groups(graph, "fuse").candidates("auto", {})]
        )
        yield outcome(lambda graph=other: passed("in-place", graph, context))
