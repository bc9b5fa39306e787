"""Laws of every recipe on every graph: validity, round trip, no collective lost, nothing kept for nothing."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.ir import OPS, Axis, DType, Graph, Node, OutputKind, Phase, Replicate, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.external_ops import CAST
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.core.instruments import Verify

contexts = st.builds(
    lambda size, dtype: Context((Axis("shard", size),), dtype),
    st.integers(1, 4),
    st.sampled_from([None, None, DType.f32, DType.f64]),
)
sharded = Context((Axis("shard", 3),))
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=map(str, RECIPES))
quick = settings(max_examples=40, deadline=None)


@every_recipe
@quick
@given(graph=graphs(), context=contexts)
def test_every_pass_leaves_a_valid_graph_that_reads_back(recipe, graph, context):
    pipeline = parse_recipe(recipe)
    after = pipeline.run(graph, context, [Verify()])
    assert pipeline.run(graph, context) == after
    assert [o.kind for o in after.outputs] == [o.kind for o in graph.outputs]
    assert [(i.kind, i.value.name, i.target) for i in after.inputs] == [
        (i.kind, i.value.name, i.target) for i in graph.inputs
    ]


def collectives(graph: Graph, *ops: str) -> list[tuple[Phase, Value]]:
    """The phase and value of everything that these collectives move, buckets taken apart."""
    moved = []
    for node in graph.nodes:
        if node.op in ops:
            packed = graph.producers.get(node.operands[0].name)
            members = packed.operands if packed is not None and packed.op == "pack" else node.operands
            moved += [(node.phase, value) for value in members]
    return moved


def made_by(graph: Graph, name: str, through: frozenset[str]) -> Node | None:
    """The node that made a value, looking through some ops."""
    node = graph.producers.get(name)
    while node is not None and node.op in through:
        node = graph.producers.get(node.operands[0].name)
    return node


def stages(after: Graph) -> dict[str, int]:
    """The stage of each parameter; one that lies whole on every rank is as good as stage 0."""
    return {i.value.name: 0 if i.value.tensor.placement == (Replicate(),) else i.stage for i in after.params}


@every_recipe
@quick
@given(graph=graphs())
def test_every_gradient_is_reduced_once_as_its_stage_demands(recipe, graph):
    after = parse_recipe(recipe).run(graph, sharded)
    stage = stages(after)
    wanted = Counter()
    for output in after.outputs:
        if output.kind is OutputKind.grad and output.target in stage:
            start = made_by(after, output.value.name, frozenset({"cast", "copy", "wait", "unpack", "offload_start"}))
            assert start.op == ("all_reduce_start" if stage[output.target] == 0 else "reduce_scatter_start")
            assert output.phase is (Phase.update if stage[output.target] == 1 else Phase.backward)
            wanted[start.op] += 1
    for op in ("all_reduce_start", "reduce_scatter_start"):
        assert len(collectives(after, op)) == wanted[op]
    held = [n.option("target") for n in after.nodes if n.op == "accumulate"]
    named = {i.value.name: i.target for i in after.params}
    grads = [o.target for o in after.outputs if o.kind is OutputKind.grad and o.target in stage]
    assert Counter(held) == Counter(named[t] for t in grads if stage[t] in (0, 1))


@every_recipe
@quick
@given(graph=graphs())
def test_every_parameter_is_gathered_as_its_stage_demands(recipe, graph):
    after = parse_recipe(recipe).run(graph, sharded)
    stage = stages(after)
    gathered = Counter()
    for phase, value in collectives(after, "all_gather_start"):
        cast = after.producers.get(value.name)
        gathered[(cast.operands[0].name if cast else value.name), phase] += 1
    assert set(gathered.values()) <= {1}
    cleaned = parse_recipe("canonicalize").run(graph, sharded)
    for name in stage:
        read = {n.phase for n in cleaned.nodes if any(v.name == name for v in n.operands)}
        read |= {Phase.backward for o in cleaned.outputs if o.value is not None and o.value.name == name}
        phases = {phase for found, phase in gathered if found == name}
        if stage[name] == 0:
            assert not phases
        elif stage[name] < 3:
            assert phases == ({min(read, key=lambda p: p.rank)} if read else set())
        else:
            assert phases - {Phase.backward} == read & {Phase.forward}
            assert read <= phases
            assert phases <= read or Phase.forward in read  # what the forward derived of it may be derived again


@every_recipe
@quick
@given(graph=graphs())
def test_every_new_value_of_a_buffer_is_the_first_ranks(recipe, graph):
    after = parse_recipe(recipe).run(graph, sharded)
    changed = [o for o in after.outputs if o.kind is OutputKind.mutation]
    makers = [made_by(after, o.value.name, frozenset({"wait", "unpack"})) for o in changed]
    assert all(o.value.tensor.placement == (Replicate(),) for o in changed)
    shared = [m for m in makers if m is not None and m.op == "broadcast_start"]
    assert len(collectives(after, "broadcast_start")) == len(shared)


@quick
@given(graph=graphs())
def test_stage_3_keeps_no_gathered_memory_for_the_backward(graph):
    plain = replace(graph, inputs=tuple(replace(i, stage=None) for i in graph.inputs))
    after = parse_recipe(RECIPES[3]).run(plain, sharded)
    memory = Memory(after)
    gathered = {n.name for n in after.nodes if n.op == "all_gather_start"}
    gathered |= {r.name for n in after.nodes if n.op == "unpack" for r in n.results}
    returned = {o.value.name for o in after.outputs if o.phase is Phase.forward and o.value is not None}
    for value in make_plan(after).saved:
        assert value.name in returned or not memory.roots(value.name) & gathered
        maker = after.producers.get(value.name)
        if maker is not None and maker.op == CAST:
            assert any(made_by(after, v.name, frozenset({"wait"})) not in gathered for v in maker.operands)


@quick
@given(graph=graphs(), context=contexts)
def test_what_is_lowered_is_waited_for_in_its_own_phase(graph, context):
    after = parse_recipe(RECIPES[3]).run(graph, context)
    assert not [n for n in after.nodes if n.op == "reshard"]
    starts = [n for n in after.nodes if n.op in OPS and OPS[n.op].lane != "compute"]
    assert len([n for n in after.nodes if n.op == "wait"]) == len(starts)
    assert bool(after.mesh) == (context.mesh[0].size > 1)
    assert after.mesh or not [n for n in starts if OPS[n.op].lane == "comm"]


@quick
@given(graph=graphs(), context=contexts)
def test_cleaning_twice_cleans_no_more(graph, context):
    for name in ("canonicalize", "dce"):
        (step,) = parse_recipe(name).passes
        once = step.run(graph, context)
        assert step.run(once, context) == once
        assert {o.value.name for o in once.outputs if o.value} == {o.value.name for o in graph.outputs if o.value}
