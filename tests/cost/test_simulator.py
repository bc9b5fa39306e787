"""The clock, worked out by hand; and what it refuses."""

import pytest

from zgraph.cost import AlphaBeta, CostTable, hardware, signature, simulate
from zgraph.errors import SimulationError
from zgraph.ir import parse_graph
from zgraph.passes import make_plan

STEP = """
graph "clock" mesh(shard=2)
op aten.mul.Tensor
op aten.tanh.default
op aten.tanh_.default writes(0) views(0)
param %a: f32[32]<S0> "a" stage=3
param %b: f32[32]<S0> "b" stage=3
input %x: f32[32]<V>
tangent %t: f32[32]<V>
fwd %as: future f32[32]<R> = all_gather_start(%a)
fwd %bs: future f32[32]<R> = all_gather_start(%b)
fwd %af: f32[32]<R> = wait(%as)
fwd %y: f32[32]<V> = aten.mul.Tensor(%x, %af)
fwd %bf: f32[32]<R> = wait(%bs)
fwd %z: f32[32]<V> = aten.mul.Tensor(%y, %bf)
bwd %u: f32[32]<V> = aten.tanh.default(%t)
bwd %p: f32[32]<P(mean)> = pending(%u, reduce="mean")
bwd %rs: future f32[32]<S0> = reduce_scatter_start(%p)
bwd %v: f32[32]<V> = aten.tanh.default(%y)
bwd %m: f32[32]<S0> = wait(%rs)
return fwd output %z
return bwd grad "a" %m
return bwd grad "x" %v
"""
MUL_US, TANH_US, WIRE_US = 10.0, 4.0, 8.0


def table(graph, slowdown=1.0):
    """Every mul takes 10 us, every tanh 4, every collective 8: 64 bytes are sent at 8 bytes a microsecond."""
    us = {"aten.mul.Tensor": MUL_US, "aten.tanh.default": TANH_US, "aten.tanh_.default": TANH_US}
    ops = {signature(n, {}): us[n.op] for n in graph.nodes if n.op in us}
    line = AlphaBeta(latency_us=0.0, bytes_per_s=64 / WIRE_US * 1e6)
    profile = hardware("cpu").model_copy(update={"overlap_slowdown": slowdown})
    return CostTable(hardware=profile, ops=ops, transfers=dict.fromkeys(("all_gather", "reduce_scatter"), line))


def test_the_clock():
    graph = parse_graph(STEP.strip() + "\n")
    timeline = simulate(make_plan(graph), table(graph), {})
    spans = {s.node: (s.lane, s.start_us, s.end_us) for s in timeline.spans}
    assert spans["as"] == ("comm", 0, 8)
    assert spans["bs"] == ("comm", 8, 16)
    assert spans["y"] == ("compute", 8, 18)
    assert spans["z"] == ("compute", 18, 28)
    assert spans["rs"] == ("comm", 32, 40)
    assert spans["v"] == ("compute", 32, 36)
    assert [(s.node, s.start, s.us) for s in timeline.stalls] == [("af", "as", 8), ("m", "rs", 4)]
    assert timeline.step_us == 40
    assert timeline.exposed_us == 12
    assert timeline.busy_us == {"compute": 28, "comm": 24, "d2h": 0, "h2d": 0}
    assert timeline.lower_bound_us == 28


def test_a_sum_takes_what_a_mean_takes_and_saying_so_nothing():
    """No instruction is left of `pending`, and neither time nor memory depends on what is pending."""
    graphs = [parse_graph(STEP.strip().replace("mean", reduce) + "\n") for reduce in ("mean", "sum")]
    mean, summed = (simulate(make_plan(graph), table(graph), {}) for graph in graphs)
    assert (mean.spans, mean.stalls, mean.memory) == (summed.spans, summed.stalls, summed.memory)
    assert "p" not in {m.node for m in mean.memory.moments}


def test_computing_is_slower_beside_a_transfer():
    graph = parse_graph(STEP.strip() + "\n")
    timeline = simulate(make_plan(graph), table(graph, slowdown=2.0), {})
    (y,) = [s for s in timeline.spans if s.node == "y"]
    assert (y.start_us, y.end_us) == (8, 22), "8 us beside the second gather do the work of 4, then 6 alone"


def test_a_wait_before_its_start_is_a_deadlock():
    plan = make_plan(parse_graph(STEP.strip() + "\n"))
    steps = plan.forward.instructions
    turned = type(plan.forward)("forward", plan.forward.arguments, (steps[2], *steps[:2], *steps[3:]), ())
    with pytest.raises(SimulationError, match="deadlock: af"):
        simulate(type(plan)(plan.graph, turned, None, None, ()), table(plan.graph), {})


def test_a_start_without_a_wait_never_ends():
    plan = make_plan(parse_graph(STEP.strip() + "\n"))
    cut = type(plan.forward)("forward", plan.forward.arguments, plan.forward.instructions[:3], ())
    with pytest.raises(SimulationError, match="nothing waits for bs"):
        simulate(type(plan)(plan.graph, cut, None, None, ()), table(plan.graph), {})


def test_writing_to_what_is_being_sent_is_refused():
    text = STEP.replace("bwd %v: f32[32]<V> = aten.tanh.default(%y)", "bwd %v: f32[32]<V> = aten.tanh_.default(%u)")
    graph = parse_graph(text.strip() + "\n")
    with pytest.raises(SimulationError, match=r"unordered access: v .* writes %u while rs"):
        simulate(make_plan(graph), table(graph), {})
