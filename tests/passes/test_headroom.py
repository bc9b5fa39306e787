"""How many bytes collectives may hold beside each op, and how many each holds."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.ir import Axis, parse_graph, verify
from zgraph.passes import RECIPES, Context, parse_recipe
from zgraph.passes.schedule import LoweredStep

LOWERED = {stage: recipe.partition(",schedule")[0] for stage, recipe in RECIPES.items()}


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), stage=st.sampled_from(sorted(LOWERED)), num_ahead=st.integers(0, 3))
def test_an_op_leaves_what_the_most_between_its_neighbours_leaves(graph, stage, num_ahead):
    context = Context(mesh=(Axis("shard", 2),))
    step = LoweredStep(parse_recipe(LOWERED[stage]).run(graph, context), context)
    _, curve = step.plain
    names = {(step.graph.nodes[p].phase.value, step.graph.nodes[p].name): i for i, p in enumerate(step.ops)}
    marks = [(at, names[key]) for at, m in enumerate(curve.moments) if (key := (m.phase, m.node)) in names]
    bytes_at = [m.total_bytes for m in curve.moments]
    used = [0] * len(step.ops)
    around = [(0, 0), *marks, (len(bytes_at) - 1, marks[-1][1] if marks else 0)]
    for (begin, one), (end, other) in itertools.pairwise(around):
        for op in {one, other} if used else ():
            used[op] = max(used[op], *bytes_at[begin : end + 1], 0)
    limit = curve.peak.total_bytes + step.ahead_bytes(num_ahead)
    assert step.headroom(num_ahead) == tuple(max(limit - u, 0) for u in used)


@pytest.mark.parametrize(("dim", "shape"), [(0, "8, 6"), (1, "4, 12")])
def test_a_gather_along_a_model_axis_holds_the_whole_and_the_parts_before_they_are_put_together(dim, shape):
    graph = parse_graph(
        f"""graph "g" mesh(tensor=2, shard=1)
op aten.neg.default
input %x: f32[4, 6]<S{dim}, V>
fwd %s: future f32[{shape}]<R, V> = all_gather_start(%x, axis="tensor")
fwd %w: f32[{shape}]<R, V> = wait(%s)
fwd %y: f32[{shape}]<R, V> = aten.neg.default(%w)
return fwd output %y
"""
    )
    verify(graph)
    (transfer,) = LoweredStep(graph, Context(mesh=(Axis("tensor", 2), Axis("shard", 1)))).transfers
    assert transfer.num_bytes == 2 * 8 * 6 * 4


def test_what_is_copied_to_the_host_starts_once_nothing_touches_it_before_the_backward():
    graph = parse_graph(
        """graph "g" mesh(shard=2)
op aten.add_.Tensor views(0) writes(0)
op aten.mul.Tensor
op aten.t.default views(0)
input %x: f32[64, 64]<V>
tangent %t: f32[64, 64]<V>
fwd %a: f32[64, 64]<V> = aten.mul.Tensor(%x, %x)
fwd %b: f32[64, 64]<V> = aten.mul.Tensor(%a, %a)
fwd %v: f32[64, 64 | 1, 64]<V> = aten.t.default(%a)
fwd %c: f32[64, 64]<V> = aten.mul.Tensor(%b, %v)
fwd %d: f32[64, 64]<V> = aten.mul.Tensor(%c, %x)
fwd %s: future f32[64, 64]<V>@host = offload_start(%a)
fwd %h: f32[64, 64]<V>@host = wait(%s)
fwd release(%a)
bwd %r: future f32[64, 64]<V> = reload_start(%h)
bwd %k: f32[64, 64]<V> = wait(%r)
bwd %g: f32[64, 64]<V> = aten.mul.Tensor(%t, %k)
return fwd output %d
return bwd grad "x" %g
"""
    )
    verify(graph)
    step = LoweredStep(graph, Context(mesh=(Axis("shard", 2),)))
    out, back = step.transfers
    assert [step.graph.nodes[step.ops[t.first]].name for t in (out, back)] == ["d", "g"]


def test_what_nothing_touches_is_copied_to_the_host_at_once():
    graph = parse_graph(
        """graph "g" mesh(shard=2)
op aten.mul.Tensor
input %x: f32[64, 64]<V>
input %u: f32[64, 64]<V>
tangent %t: f32[64, 64]<V>
fwd %a: f32[64, 64]<V> = aten.mul.Tensor(%x, %x)
fwd %b: f32[64, 64]<V> = aten.mul.Tensor(%a, %a)
fwd %s: future f32[64, 64]<V>@host = offload_start(%u)
fwd %h: f32[64, 64]<V>@host = wait(%s)
bwd %r: future f32[64, 64]<V> = reload_start(%h)
bwd %k: f32[64, 64]<V> = wait(%r)
bwd %g: f32[64, 64]<V> = aten.mul.Tensor(%t, %k)
return fwd output %b
return bwd grad "x" %g
"""
    )
    verify(graph)
    out, _ = LoweredStep(graph, Context(mesh=(Axis("shard", 2),))).transfers
    assert out.first == 0
