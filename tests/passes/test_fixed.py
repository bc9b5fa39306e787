"""What is fixed is computed apart, once, and has the same name in every graph of a model."""

from zgraph.ir import InputKind, parse_graph, verify
from zgraph.passes.plan.fixed import only, split_fixed

STEP = """graph "{name}"
op aten.add.Tensor
op aten.index_put.default
op aten.mm.default
op aten.mul.Tensor
op aten.t.default views(0)
param %{p}: f32[4, 8] "layer.weight"
buffer %scale: f32[4, 8] "layer.scale"
buffer %cache: f32[3, 4] "cache"
input %x: f32[{rows}, 8] "x"
input %at: i64[{rows}] "at"
fwd %{p}_a: f32[4, 8] = aten.mul.Tensor(%{p}, %scale)
fwd %{p}_b: f32[4, 8] = aten.mul.Tensor(%{p}, %scale)
fwd %a_t: f32[8, 4 | 1, 8] = aten.t.default(%{p}_a)
fwd %b_t: f32[8, 4 | 1, 8] = aten.t.default(%{p}_b)
fwd %y: f32[{rows}, 4] = aten.mm.default(%x, %a_t)
fwd %z: f32[{rows}, 4] = aten.mm.default(%x, %b_t)
fwd %sum: f32[{rows}, 4] = aten.add.Tensor(%y, %z)
fwd %new: f32[3, 4] = aten.index_put.default(%cache, [%at], %sum)
return fwd mutation "cache" %new
return fwd output %sum
"""


def split(name: str, rows: int, parameter: str):
    graph = parse_graph(STEP.format(name=name, rows=rows, p=parameter))
    fixed, call = split_fixed(graph)
    for part in (fixed, call):
        verify(part)
    return fixed, call


def names(call):
    return [i.target for i in call.inputs if i.kind is InputKind.constant]


def test_what_depends_on_the_model_alone_is_apart_and_made_once():
    fixed, call = split("decode", 1, "w")
    assert [n.op for n in call.nodes] == [
        "aten.mm.default",
        "aten.mm.default",
        "aten.add.Tensor",
        "aten.index_put.default",
    ]
    assert [i.target for i in call.inputs if i.kind is not InputKind.constant] == ["cache", "x", "at"]
    assert call.nodes[0].operands[1] == call.nodes[1].operands[1]
    assert [i.target for i in fixed.inputs] == ["layer.weight", "layer.scale"]
    assert len(fixed.outputs) == len(names(call)) == 1
    assert [n.op for n in fixed.nodes] == ["aten.mul.Tensor", "aten.t.default"]


def test_graphs_of_one_model_share_names():
    (one, call), (_, other) = split("decode", 1, "w"), split("prefill", 2, "v")
    assert names(call) == names(other)
    assert only(one, []).nodes == ()
    assert only(one, [0]).nodes == one.nodes
