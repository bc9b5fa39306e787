"""Rotary embeddings as one op: what is one, and what only looks like one."""

import pytest

from tests.passes.test_goldens import FOLDER, Golden
from zgraph.ir import Graph, parse_graph, verify
from zgraph.ir.external_ops import ROTARY
from zgraph.passes import Context, parse_recipe
from zgraph.passes.fusion.rotary import REWRITES
from zgraph.passes.plan.zero_tangents import without_tangents

TEXT = Golden.read(FOLDER / "fuse-rotary.zir").before


def fused(*changes: tuple[str, str]) -> Graph:
    """The golden's graph, changed, after the pass."""
    text = TEXT
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    graph = parse_graph(text)
    verify(graph)
    made = parse_recipe("fuse").run(graph, Context())
    verify(made)
    return made


def rotary(graph: Graph) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Options of the op: whether it is a gradient, and in which order its dimensions lie."""
    return {n.name: (n.args[4], n.args[3]) for n in graph.nodes if n.op == ROTARY}


BOTH = {"y": (False, (0, 2, 1, 3)), "dq": (True, (0, 2, 1, 3))}
BACKWARD = {"dq": BOTH["dq"]}
FORWARD = {"y": BOTH["y"]}


def test_factors_and_summands_may_stand_in_any_order():
    commuted = [
        ("Tensor(%q, %cos)", "Tensor(%cos, %q)"),
        ("Tensor(%a, %b)", "Tensor(%b, %a)"),
        ("Tensor(%p, %o)", "Tensor(%o, %p)"),
        ("Tensor(%g, %sin)", "Tensor(%sin, %g)"),
    ]
    assert rotary(fused(*commuted)) == BOTH


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ([("return fwd output %y", "return fwd output %y\nreturn fwd output %r")], BACKWARD),
        ([("cat.default([%n, %l]", "cat.default([%l, %n]")], BACKWARD),
        ([("cat.default([%n, %l], -1)", "cat.default([%n, %l], 2)")], BACKWARD),
        ([("3, 0, 4) @", "3, 1, 5) @")], {}),
        ([("%q, 3, 4, 9223372036854775807", "%q, 3, 4, 7")], BACKWARD),
        ([("(%un, [2, 3, 5, 8], 3, 4,", "(%un, [2, 3, 5, 8], 3, 0,")], FORWARD),
        ([("Tensor(%g, %cos)", "Tensor(%u, %cos)")], FORWARD),
        ([("Tensor(%p, %o)", "Tensor(%p, %o, alpha=2)")], FORWARD),
        ([("%cos: bf16[1, 1, 5, 8]", "%cos: bf16[8]")], {}),
        ([("%sin: bf16[1, 1, 5, 8]", "%sin: bf16[2, 1, 5, 8]")], {}),
        ([("op aten.neg", "op aten.exp.default\nop aten.neg"), ("neg.default(%h)", "exp.default(%h)")], BACKWARD),
        ([("op aten.neg", "op aten.sub.Tensor\nop aten.neg"), ("add.Tensor(%a, %b)", "sub.Tensor(%a, %b)")], BACKWARD),
        ([("%y: bf16[2, 3, 5, 8 | 120, 8, 24, 1]", "%y: f32[2, 3, 5, 8]")], BACKWARD),
        ([("%y: bf16[2, 3, 5, 8 | 120, 8, 24, 1]", "%y: bf16[2, 3, 5, 8 | 240, 16, 48, 2]")], BACKWARD),
    ],
    ids=[
        "read by others",
        "not negated",
        "another dim",
        "not from the first",
        "short",
        "not apart",
        "of a product",
        "scaled",
        "angles of one row",
        "angles unlike",
        "another op",
        "a difference",
        "cast",
        "with gaps",
    ],
)
def test_what_only_looks_like_one_is_left(changes, left):
    assert rotary(fused(*changes)) == left


def test_a_write_between_keeps_the_ops_apart():
    line = "fwd %b: bf16[2, 3, 5, 8] = aten.mul.Tensor(%r, %sin)"
    write = "fwd %c: bf16[1, 1, 5, 8] = aten.copy_.default(%cos, %sin)\n"
    ops = ("op aten.mul", "op aten.copy_.default views(0) writes(0)\nop aten.mul")
    assert rotary(fused(ops, (line, write + line))) == BACKWARD


def test_angles_made_of_what_they_turn_are_none():
    first = 'fwd %a: bf16[2, 3, 5, 8 | 120, 8, 24, 1] = aten.mul.Tensor(%q, %cos) @ "attn"\n'
    second = "fwd %b: bf16[2, 3, 5, 8] ="
    moved = first.replace("%cos", "%r") + second
    assert rotary(fused((first, ""), (second, moved), ("%sin: bf16[1, 1,", "%sin: bf16[2, 3,"))) == {}


def test_regions_that_the_user_marked_stay_apart():
    assert rotary(fused(("%n, %l], -1)", "%n, %l], -1) checkpoint=1"))) == BACKWARD


def test_layouts_are_those_that_readers_saw():
    """A result that lay without gaps does so again, and a copy stays where something else reads what it copied."""
    assert rotary(fused(("%y: bf16[2, 3, 5, 8 | 120, 8, 24, 1]", "%y: bf16[2, 3, 5, 8]")))["y"] == (False, (0, 1, 2, 3))
    made = fused(("return bwd output none\nreturn bwd output none", "return bwd output %dq\nreturn bwd output none"))
    assert rotary(made)["dq"] == (True, (0, 1, 2, 3))
    assert [n.op for n in made.nodes][-1] == "aten.clone.default"


def test_the_gradient_of_nothing_is_nothing():
    graph = fused(('param %w: bf16[2, 5, 3, 8] "w" stage=0', "input %w: bf16[2, 5, 3, 8]"))
    assert rotary(graph) == BOTH
    loss_only = without_tangents(graph, frozenset({"g"}))
    assert loss_only is not None
    assert rotary(loss_only) == FORWARD


def test_patterns_hold_together():
    for rewrite in REWRITES:
        assert {call.result for call in rewrite.becomes} <= set(rewrite.subgraph.makers)
        assert rewrite.becomes[-1].result == rewrite.subgraph.root.result
