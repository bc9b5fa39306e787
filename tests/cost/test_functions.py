"""Work and memory of ops that call functions, against counts by hand and what torch's allocator is asked for."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from zgraph.bridge.aten import resolve, to_torch
from zgraph.cost.work import work
from zgraph.cost.workspace import NUM_THREADS, workspace_bytes
from zgraph.ir import parse_graph

CALLS = """graph "g"
op higher_order.{op}.default multi
graph "small"
  op aten.neg.default
  input %a: f32[4, 4]
  fwd %b: f32[4, 4] = aten.neg.default(%a)
  return fwd output %b
end
graph "large"
  op aten.mm.default
  op aten.neg.default
  input %a: f32[4, 4]
  fwd %b: f32[4, 4] = aten.mm.default(%a, %a)
  fwd %c: f32[4, 4] = aten.neg.default(%b)
  fwd %d: f32[4, 4] = aten.neg.default(%c)
  return fwd output %d
end
input %p: bool[]
input %x: f32[{shape}]
fwd %y: f32[{shape}] = higher_order.{op}.default({args})
"""

ATTENTION = """graph "g"
op higher_order.flex_attention.default multi
graph "score"
  op aten.mul.Tensor
  input %s: f32[]
  input %b: i32[]
  input %h: i32[]
  input %q: i32[]
  input %k: i32[]
  fwd %t: f32[] = aten.mul.Tensor(%s, %q)
  return fwd output %t
end
graph "mask"
  op aten.ge.Tensor
  input %b: i32[]
  input %h: i32[]
  input %q: i32[]
  input %k: i32[]
  fwd %m: bool[] = aten.ge.Tensor(%q, %k)
  return fwd output %m
end
input %q: f32[2, 2, 256, 8]
input %k: f32[2, 1, 128, 8]
input %v: f32[2, 1, 128, 16]
fwd %o: f32[2, 2, 256, 16], %l: f32[2, 2, 256], %m: f32[2, 2, 256] = higher_order.flex_attention.default(%q, %k, %v, \
graph("score"), [256, 128, graph("mask")], 0.5, [], [], [])
"""


@pytest.mark.parametrize(
    ("op", "shape", "args", "flop", "taken"),
    [
        ("cond", "4, 4", '%p, graph("small"), graph("large"), [%x]', 128, 128),
        ("while_loop", "4, 4", 'graph("small"), graph("large"), [%x], []', 128, 64 + 128 + 64),
        ("map_impl", "3, 4, 4", 'graph("large"), [%x], [], graph("small")', 3 * 128, 64 + 128 + 3 * 64),
    ],
)
def test_functions_count_as_often_as_they_are_called(op: str, shape: str, args: str, flop: int, taken: int) -> None:
    graph = parse_graph(CALLS.format(op=op, shape=shape, args=args))
    assert work(graph, graph.nodes[0]).flop == flop
    assert workspace_bytes(graph.nodes[0], {}) == workspace_bytes(graph.nodes[0], {NUM_THREADS: 1}) == taken


def test_attention_by_functions_is_counted_dense_and_takes_no_more() -> None:
    graph = parse_graph(ATTENTION)
    (node,) = graph.nodes
    assert work(graph, node).flop == 2 * (2 * 2 * 256 * 128) * (8 + 16)
    given = {v.name: torch.randn([int(d) for d in v.tensor.shape]) for v in node.operands}
    args = [to_torch(a, torch.device("cpu"), lambda v: given[v.name]) for a in node.args]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        resolve(node.op)(*args)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    results = sum(4 * int(r.tensor.numel) for r in node.results)
    assert most <= workspace_bytes(node, {NUM_THREADS: 1}) + results <= 4 * most
