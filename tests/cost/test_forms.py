"""Closed forms against the sums that they stand for."""

import sympy

from zgraph.cost import NUM_RANKS, closed_form, hardware, work
from zgraph.ir import parse_graph
from zgraph.ir.symbols import evaluate, symbol

LINEAR = """
graph "linear"
op aten.mm.default
op aten.tanh.default
op aten.t.default views(0)
input %s: int(s0)
param %w: f32[64, 32] "w"
input %x: f32[s0, 64]
tangent %t: f32[s0, 32]
fwd %h: f32[s0, 32] = aten.mm.default(%x, %w)
fwd %y: f32[s0, 32] = aten.tanh.default(%h)
bwd %xt: f32[64, s0 | 1, 64] = aten.t.default(%x)
bwd %g: f32[64, 32] = aten.mm.default(%xt, %t)
return fwd output %y
return bwd grad "w" %g
"""


def test_flop_and_bytes_are_expressions_in_the_batch():
    form, batch = closed_form(parse_graph(LINEAR.strip() + "\n")), symbol("s0")
    assert sympy.simplify(form.flop - 2 * (2 * batch * 64 * 32)) == 0
    assert sympy.simplify(form.moved_bytes - 2 * 4 * batch * 32) == 0
    assert form.num_ops == 3, "a view does nothing"


def test_the_form_at_a_size_is_the_sum_over_the_nodes():
    graph = parse_graph(LINEAR.strip() + "\n")
    form, hints = closed_form(graph), {"s0": 48}
    assert evaluate(form.flop, hints) == sum(evaluate(work(graph, n).flop, hints) for n in graph.nodes)


def test_the_wire_by_stage():
    form = closed_form(parse_graph(LINEAR.strip() + "\n"))
    whole = 4 * 64 * 32
    assert [form.wire_bytes(stage).subs(NUM_RANKS, 4) for stage in range(4)] == [
        whole * rounds * sympy.Rational(3, 4) for rounds in (2, 2, 2, 3)
    ]


def test_a_slow_network_bounds_small_batches_and_computing_large_ones():
    form, batch = closed_form(parse_graph(LINEAR.strip() + "\n")), symbol("s0")
    step = form.step_s(3, hardware("2x1-h100"))
    values = {NUM_RANKS: 2}
    small, large = (float(step.subs({**values, batch: size})) for size in (1, 10**9))
    assert small < large
    computing = float(form.computing_s(hardware("2x1-h100")).subs({batch: 10**9}))
    assert abs(large / computing - 1) < 1e-9
