"""The backward without the tangents of outputs that nothing is computed from."""

import pytest

from zgraph.ir import Axis, Graph, Phase, parse_graph, verify
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents

HEAD = """graph "g"
op aten.add.Tensor
op aten.expand.default views(0)
op aten.mul.Tensor
op aten.sum.default
op aten.tanh.default
op aten.tanh_backward.default
param %w: f32[4] "w"
param %v: f32[4] "v"
input %x: f32[4]
tangent %t: f32[]
tangent %u: f32[4]
fwd %p: f32[4] = aten.mul.Tensor(%x, %w)
fwd %h: f32[4] = aten.tanh.default(%p)
fwd %loss: f32[] = aten.sum.default(%h)
return fwd output %loss
return fwd output %h
"""


def loss_only(lines: str, *absent: str) -> Graph | None:
    graph = parse_graph(HEAD + lines)
    found = without_tangents(graph, frozenset(absent or ("u",)))
    if found is not None:
        verify(found)
    return found


def backward(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.phase.value == "bwd"]


def test_a_sum_with_zeros_is_its_other_summand():
    found = loss_only(
        "bwd %e: f32[4 | 0] = aten.expand.default(%t, [4])\n"
        "bwd %c: f32[4] = aten.mul.Tensor(%e, %x)\n"
        "bwd %s: f32[4] = aten.add.Tensor(%c, %u)\n"
        "bwd %g: f32[4] = aten.mul.Tensor(%s, %h)\n"
        'return bwd grad "w" %g\n'
    )
    assert backward(found) == ["e", "c", "g"]
    assert [v.name for v in found.producers["g"].operands] == ["c", "h"]
    assert [i.value.name for i in found.inputs] == ["w", "v", "x", "t"]


def test_what_only_carries_zeros_is_left_out():
    found = loss_only(
        "bwd %z: f32[4] = aten.mul.Tensor(%x, %u)\n"
        "bwd %y: f32[] = aten.sum.default(%z)\n"
        "bwd %s: f32[] = aten.add.Tensor(%y, %t)\n"
        "bwd %g: f32[4] = aten.mul.Tensor(%x, %s)\n"
        'return bwd grad "w" %g\nreturn bwd grad "x" %z\n'
    )
    assert backward(found) == ["g"]
    assert [v.name for v in found.producers["g"].operands] == ["x", "t"]
    assert [o.value.name if o.value else None for o in found.outputs] == ["loss", "h", "g", None]


@pytest.mark.parametrize(
    "lines",
    [
        # an op that may make something of zeros
        'bwd %y: f32[4] = aten.tanh_backward.default(%x, %u)\nreturn bwd grad "x" %y\n',
        # a sum that changes the type of its other summand
        'bwd %y: f32[4] = aten.add.Tensor(%t, %u)\nreturn bwd grad "x" %y\n',
        'bwd %y: f32[4] = aten.add.Tensor(%x, %u, alpha=2)\nreturn bwd grad "x" %y\n',
        # a parameter whose gradient would be zero: it is reduced on every rank, whatever this one differentiates
        'bwd %y: f32[4] = aten.mul.Tensor(%x, %u)\nreturn bwd grad "w" %y\n',
        'return bwd grad "w" %u\n',
    ],
)
def test_where_zeros_matter_there_is_no_lean_backward(lines):
    assert loss_only(lines) is None


def test_two_gradients_never_become_one_tensor():
    found = loss_only(
        "bwd %c: f32[4] = aten.mul.Tensor(%x, %t)\n"
        "bwd %s: f32[4] = aten.add.Tensor(%c, %u)\n"
        'return bwd grad "w" %c\nreturn bwd grad "v" %s\n'
    )
    names = [o.value.name for o in found.outputs] if found else []
    assert len(set(names)) == len(names)


def test_only_the_tangents_beside_the_loss_are_taken_to_be_absent():
    assert zero_tangents(parse_graph(HEAD)) == {"u"}
    assert zero_tangents(parse_graph(HEAD.replace("tangent %u: f32[4]", "tangent %u: f32[]"))) == set()
    assert zero_tangents(parse_graph(HEAD.replace("tangent %t: f32[]", "tangent %t: f32[1]"))) == set()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", RECIPES)
def test_a_plan_has_both_backwards(stage, num_ranks):
    lines = "bwd %c: f32[4] = aten.mul.Tensor(%x, %t)\nbwd %s: f32[4] = aten.add.Tensor(%c, %u)\n"
    lines += "bwd %d: f32[4] = aten.mul.Tensor(%s, %h)\n"
    graph = parse_graph(HEAD + lines + 'return bwd grad "w" %s\nreturn bwd grad "v" %d\n')
    plan = make_plan(parse_recipe(RECIPES[stage]).run(graph, Context((Axis("shard", num_ranks),))))
    assert plan.zero_tangents == {"u"}
    for full, without in zip((plan.backward, plan.unsynced), plan.loss_only, strict=True):
        assert "aten.add.Tensor" in [i.node.op for i in full.instructions]
        assert "aten.add.Tensor" not in [i.node.op for i in without.instructions]
        assert without.arguments == full.arguments
        assert len(without.results) == len(full.results)
        assert not any(v.name == "u" for i in without.instructions for v in i.node.operands)


ZEROS = """graph "g"
op aten.add.Tensor
op aten.mul.Tensor
op aten.sum.default
param %w: f32[4] "w"
input %x: f32[4]
tangent %t: f32[]
tangent %u: f32[4]
tangent %v: f32[4]
fwd %y: f32[4] = aten.mul.Tensor(%x, %w)
fwd %z: f32[4] = aten.mul.Tensor(%y, %w)
fwd %l: f32[] = aten.sum.default(%y)
bwd %e: f32[4] = aten.mul.Tensor(%t, %x)
bwd %both: f32[4] = aten.add.Tensor(%u, %v)
bwd %more: f32[4] = aten.add.Tensor(%both, 0)
bwd %a: f32[4] = aten.add.Tensor(%more, %e)
bwd %g: f32[4] = aten.mul.Tensor(%a, %x)
return fwd output %l
return fwd output %y
return fwd output %z
return bwd grad "w" %g
"""


def test_sums_of_zeros_are_zero():
    graph = parse_graph(ZEROS)
    assert zero_tangents(graph) == {"u", "v"}
    found = without_tangents(graph, zero_tangents(graph))
    assert [str(n.name) for n in found.nodes if n.phase is Phase.backward] == ["e", "g"]
    assert [v.name for v in found.nodes[-1].operands] == ["e", "x"]
    only_one = without_tangents(graph, frozenset({"u"}))
    assert [n.name for n in only_one.nodes if n.phase is Phase.backward] == ["e", "more", "a", "g"]
    assert without_tangents(graph, frozenset({"t", "u", "v"})) is None
