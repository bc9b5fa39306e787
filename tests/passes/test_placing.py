"""Costs of a placement, and where partial sums are reduced."""

from types import SimpleNamespace

import pytest

from zgraph.ir import Axis, Graph, Partial, Placement, Replicate, Shard, TensorType, Value, parse_graph, verify
from zgraph.ir.symbols import parse_dim
from zgraph.ir.types import DType
from zgraph.passes import Context, parse_recipe
from zgraph.passes.analysis.placing import Walk, wire_bytes
from zgraph.passes.place import Place, _Placer

R, P, S = Replicate(), Partial("sum"), Shard

HEAD = """graph "sums"
op aten.add.Tensor
op aten.cat.default
op aten.mm.default
op aten.mul.Tensor
op aten.sum.default
param %w: f32[8, 8] "w" stage=3 tensor=S0
param %u: f32[8, 8] "u" stage=3 tensor=S0
input %x: f32[4, 8]
input %z: f32[4, 8]
fwd %a: f32[4, 8] = aten.mm.default(%x, %w)
fwd %b: f32[4, 8] = aten.mm.default(%z, %u)
"""


def placed(text: str, num_ranks: int = 2) -> Graph:
    graph = parse_graph(HEAD + text)
    verify(graph)
    made = parse_recipe("place").run(graph, Context(mesh=(Axis("tensor", num_ranks),)))
    verify(made)
    return made


def sums(graph: Graph) -> list[str]:
    """The values that are reduced, by their captured names."""
    return [
        node.operands[0].name
        for node in graph.nodes
        if node.op == "reshard"
        and node.operands[0].tensor.placement[0] == P
        and node.results[0].tensor.placement[0] == R
    ]


@pytest.mark.parametrize(
    ("old", "new", "num_bytes"),
    [
        (P, R, 2 * 3 / 4 * 96),
        (S(0), R, 3 / 4 * 96),
        (P, S(1), 3 / 4 * 96),
        (S(0), S(1), 3 / 4 * 96 / 4),
        (R, S(0), 0),
        (R, P, 0),
        (S(0), P, 0),
        (Partial("max"), S(0), 144.0),  # all-reduced, then cut
    ],
    ids=str,
)
def test_bytes_that_a_rank_sends(old: Placement, new: Placement, num_bytes: float) -> None:
    assert wire_bytes(TensorType(DType.f32, (4, 6)), old, new, 4) == num_bytes


def test_of_a_size_that_is_not_known_one_number_is_counted() -> None:
    assert wire_bytes(TensorType(DType.bf16, (parse_dim("s0"), 6)), S(0), R, 4) == 1.5


def test_sums_that_are_added_are_reduced_once() -> None:
    assert sums(placed("fwd %y: f32[4, 8] = aten.add.Tensor(%a, %b)\nreturn fwd output %y\n")) == ["y"]


def test_a_sum_that_is_added_to_a_whole_value_is_reduced_where_it_is_made() -> None:
    text = "fwd %m: f32[4, 8] = aten.mul.Tensor(%b, %b)\nfwd %y: f32[4, 8] = aten.add.Tensor(%a, %m)\n"
    assert sorted(sums(placed(text + "return fwd output %y\n"))) == ["a", "b"]


def test_a_sum_that_is_read_twice_is_reduced_where_it_is_made() -> None:
    text = "fwd %y: f32[4, 8] = aten.add.Tensor(%a, %b)\nreturn fwd output %y\nreturn fwd output %a\n"
    assert sums(placed(text)) == ["a", "b"]


def test_what_is_read_by_what_is_not_linear_is_reduced_before_it() -> None:
    text = "fwd %y: f32[4, 8] = aten.mul.Tensor(%a, %b)\nreturn fwd output %y\n"
    assert sums(placed(text)) == ["a", "b"]


def test_a_sum_is_not_kept_until_it_is_larger() -> None:
    text = "fwd %y: f32[8, 8] = aten.cat.default([%a, %b])\nreturn fwd output %y\n"
    assert sums(placed(text)) == ["a", "b"]


def test_a_chain_of_sums_is_reduced_at_its_end() -> None:
    text = (
        "fwd %c: f32[4, 8] = aten.add.Tensor(%a, %b)\nfwd %d: f32[4, 8] = aten.mm.default(%z, %w)\n"
        "fwd %y: f32[4, 8] = aten.add.Tensor(%c, %d)\nreturn fwd output %y\n"
    )
    assert sums(placed(text)) == ["y"]


def test_a_value_that_a_node_reads_twice_has_one_placement() -> None:
    made = placed("fwd %q: f32[8, 8] = aten.mm.default(%w, %w)\nreturn fwd output %q\n")
    first, second = next(node for node in made.nodes if node.results and node.results[0].name == "q").operands
    assert first == second


def test_parameters_stay_where_their_user_wants_them_though_less_would_be_sent() -> None:
    """The product before is cut along its rows, which the next one sums over: it is gathered, not the parameter."""
    text = (
        "input %l: f32[8, 64]\n"
        "fwd %p: f32[8, 64] = aten.mm.default(%w, %l)\nfwd %y: f32[8, 64] = aten.mm.default(%u, %p)\n"
        "return fwd output %y\n"
    )
    head, nodes = HEAD.split("fwd %a")[0], text
    graph = parse_graph(head + nodes)
    made = parse_recipe("place").run(graph, Context(mesh=(Axis("tensor", 2),)))
    assert [n.operands[0].name for n in made.nodes if n.op == "reshard"] == ["p", "y"]


def test_without_such_an_axis_nothing_is_placed() -> None:
    graph = parse_graph(HEAD + "return fwd output %a\nreturn fwd output %b\n")
    assert parse_recipe("place").run(graph, Context(mesh=(Axis("shard", 2),))) is graph


def test_an_axis_of_data_is_refused() -> None:
    with pytest.raises(ValueError, match="axis must be one of tensor"):
        Place(axis="shard")


def test_what_brings_an_output_where_it_is_wanted_comes_from_the_line_that_made_it() -> None:
    made = placed('fwd %y: f32[4, 8] = aten.add.Tensor(%a, %b) @ "model.last"\nreturn fwd output %y\n')
    assert [n.origin.module for n in made.nodes if n.op == "reshard"][-1] == "model.last"


def test_a_value_is_moved_from_where_that_sends_the_least() -> None:
    walk = object.__new__(Walk)
    walk.num_ranks = 4
    kind = TensorType(DType.f32, (4, 6))
    assert walk.moved(kind, {P, S(0), S(1)}, R) == 3 / 4 * 96
    assert walk.moved(kind, {P, S(0)}, S(0)) == 0.0


@pytest.mark.parametrize(
    ("strides", "laid"),
    [((12, 2), None), ((2, 8), (1, 4)), ((0, 1), (0, 1)), ((parse_dim("s0"), 1), (parse_dim("s0"), 1))],
)
def test_a_part_that_is_moved_has_no_gaps_unless_its_rows_are_one_in_memory(strides, laid) -> None:
    """As a part of a fused projection has them; what is expanded, or of unknown strides, stays."""
    placer = object.__new__(_Placer)
    placer.source, placer.has_parts = SimpleNamespace(nodes=(), users={}), True
    kind = TensorType(DType.f32, (4, 6), strides=strides)
    assert placer.laid(Value("x", kind), kind).strides == laid
