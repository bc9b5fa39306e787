"""Plans: every value freed exactly once or returned, nothing read after it is gone, exactly what crosses saved."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.errors import ContractError
from zgraph.ir import Axis, Graph, InputKind, Phase, Plan, Program, TensorType, parse_graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe

TEXT = """graph "g"
op aten.mul.Tensor
op aten.tanh.default
param %w: f32[4] "w"
constant %c: f32[4] "c"
buffer %b: f32[4] "b"
input %s: int(s0)
input %x: f32[4]
input %unused: f32[4]
tangent %t: f32[4]
fwd %h: f32[4] = aten.mul.Tensor(%x, %c)
fwd %y: f32[4] = aten.mul.Tensor(%h, %w)
bwd %u: f32[4] = aten.mul.Tensor(%t, %h)
bwd %g: f32[4] = aten.mul.Tensor(%u, %b, %s)
bwd %gx: f32[4] = aten.mul.Tensor(%t, %w)
return fwd output %y
return bwd grad "w" %g
return bwd output none
return bwd grad "x" %gx
"""


def run_through(program: Program, plan: Plan) -> None:
    """Follow births and deaths: only what is alive is read, and at the end only what is returned is alive."""
    read = {v.name for i in program.instructions for v in i.node.operands}
    returned = {v.name for v in program.results if v is not None}
    alive = {v.name for v in program.arguments if v.name in read | returned} | plan.resident
    for instruction in program.instructions:
        for value in instruction.node.operands:
            assert value.name in alive, f"%{value.name} is read, but not alive"
        for result in instruction.node.results:
            assert result.name not in alive
            alive.add(result.name)
        for name in set(instruction.frees) - plan.resident:
            assert name in alive, f"%{name} is freed twice"
            alive.remove(name)
        assert len(set(instruction.frees)) == len(instruction.frees)
    assert alive - plan.resident == returned - plan.resident


def crossing(graph: Graph) -> set[str]:
    """Values that the forward has and the backward reads or returns; those in the model do not cross."""
    at_rest = {i.value.name for i in graph.inputs if i.kind in (InputKind.param, InputKind.constant, InputKind.tangent)}
    later = [n for n in graph.nodes if n.phase is not Phase.forward]
    made_later = {r.name for n in later for r in n.results}
    read = {v.name for n in later for v in n.operands}
    read |= {o.value.name for o in graph.outputs if o.phase is not Phase.forward and o.value is not None}
    return read - made_later - at_rest


def names(values):
    return [v if v is None else v.name for v in values]


def test_a_plan_by_hand():
    plan = make_plan(parse_graph(TEXT))
    assert names(plan.saved) == ["h", "b", "s"]
    assert names(plan.forward.arguments) == ["w", "b", "s", "x", "unused"]
    assert names(plan.forward.results) == ["y", "h", "b", "s"]
    assert [(i.node.name, i.frees) for i in plan.forward.instructions] == [("h", ("x", "c")), ("y", ("w",))]
    assert names(plan.backward.arguments) == ["h", "b", "s", "t"]
    assert names(plan.backward.results) == ["g", None, "gx"]
    assert [(i.node.name, i.frees) for i in plan.backward.instructions] == [
        ("u", ("h",)),
        ("g", ("u", "b", "s")),
        ("gx", ("t", "w")),
    ]
    assert plan.resident == {"w", "c"}
    assert plan.unsynced.instructions == plan.backward.instructions


def test_a_graph_without_a_backward_saves_nothing():
    text = "\n".join(line for line in TEXT.splitlines() if "bwd" not in line and "tangent" not in line)
    plan = make_plan(parse_graph(text))
    assert plan.backward is plan.unsynced is None
    assert plan.saved == ()
    run_through(plan.forward, plan)


def test_a_result_that_nothing_reads_is_freed_at_once():
    text = TEXT.replace("fwd %y", "fwd %lost: f32[4] = aten.tanh.default(%h)\nfwd %y")
    (_, lost, _) = make_plan(parse_graph(text)).forward.instructions
    assert lost.frees == ("lost",)


@settings(max_examples=80, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES.values())), st.integers(1, 3))
def test_plans_of_random_graphs(graph, recipe, num_ranks):
    after = parse_recipe(recipe).run(graph, Context((Axis("shard", num_ranks),)))
    plan = make_plan(after)
    assert set(names(plan.saved)) == crossing(after)
    assert len(set(names(plan.saved))) == len(plan.saved)
    kinds = [isinstance(v.type, TensorType) for v in plan.saved]
    assert kinds == sorted(kinds, reverse=True)
    for program in (plan.forward, plan.backward, plan.unsynced):
        run_through(program, plan)
    assert plan.forward.results[len(plan.forward.results) - len(plan.saved) :] == plan.saved
    run = [i.node for p in (plan.forward, plan.backward) for i in p.instructions]
    assert [(n.op, n.results) for n in run] == [(n.op, n.results) for n in after.nodes if n.op != "pending"]
    assert plan.fingerprint == make_plan(after).fingerprint


def test_lanes_and_collectives_come_from_the_ops_table():
    plan = make_plan(parse_recipe(RECIPES[3]).run(parse_graph(TEXT), Context((Axis("shard", 2),))))
    lanes = {i.node.op: i.lane for p in (plan.forward, plan.backward) for i in p.instructions}
    assert {op for op, lane in lanes.items() if lane == "comm"} == {"all_gather_start", "reduce_scatter_start"}
    assert [n.op for n in plan.collectives] == [
        n.op for n in plan.graph.nodes if n.op in lanes and lanes[n.op] == "comm"
    ]


def test_a_graph_that_is_not_lowered_is_refused():
    placed = parse_recipe("partition(stage=2),all-gather").run(parse_graph(TEXT), Context((Axis("shard", 2),)))
    with pytest.raises(ContractError, match=r"of %g_pending from f32\[4\]<P\(mean\)> to f32\[4\]<S0>; add"):
        make_plan(placed)


def test_of_pending_nothing_is_left_but_the_type():
    """Readers of its result read its operand, which is freed once, also where others read that too."""
    placed = parse_recipe(RECIPES[0]).run(parse_graph(TEXT), Context((Axis("shard", 2),)))
    assert [n.op for n in placed.nodes].count("pending") == 1
    plan = make_plan(placed)
    for program in (plan.forward, plan.backward, plan.unsynced):
        assert "pending" not in {i.node.op for i in program.instructions}
        run_through(program, plan)
    (added,) = [i.node for i in plan.backward.instructions if i.node.op == "accumulate"]
    assert (added.operands[0].name, str(added.operands[0].type)) == ("g", "f32[4]<P(mean)>")
    assert [v.name for v in plan.unsynced.results if v is not None] == ["g", "gx"]
