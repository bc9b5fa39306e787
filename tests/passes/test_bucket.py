"""Buckets move gathers and reductions, never what is computed."""

from functools import cache

import pytest
import torch

import small
import zgraph
from zgraph.cost import CostTable, hardware
from zgraph.cost.table import AlphaBeta
from zgraph.ir import OPS, Axis, Graph, parse_graph
from zgraph.passes import Context, bucket, parse_recipe
from zgraph.passes.bucket import Bucket

TWO = Context(mesh=(Axis("shard", 2),))


@cache
def captured() -> Graph:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return zgraph.trace(small.llama(16, 4, 13), input_ids=ids, labels=ids, param_dtype=torch.bfloat16)


def computed(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.op not in OPS]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("max_bytes", [2000, 10_000, 1_000_000])
def test_what_is_computed_again_stays_where_it_is_needed(stage, max_bytes):
    """A bucket waits for the casts of all its members, which must not hold up what comes after it."""
    before = parse_recipe(f"canonicalize,partition(stage={stage}),recompute(keep_bytes=1)").run(captured(), TWO)
    after = Bucket(max_bytes=max_bytes, pack_below_bytes=max_bytes).run(before, TWO)
    assert after != before
    assert computed(after) == computed(before)


@pytest.mark.parametrize("fewest", [True, False])
def test_the_fastest_of_two_choices_is_taken(fewest, monkeypatch):
    """Two of the three sizes that are tried give the same buckets here, and the largest none."""
    graph = parse_recipe("canonicalize,partition(stage=3)").run(captured(), TWO)
    plain, tried = Bucket.groups, list[int]()

    def groups(self: Bucket, graph: Graph, max_bytes: int, below: int) -> list[list[int]]:
        tried.append(max_bytes)
        return [] if max_bytes == max(tried) and len(tried) == 3 else plain(self, graph, 20_000, 20_000)

    monkeypatch.setattr(Bucket, "groups", groups)
    sign = 1 if fewest else -1
    monkeypatch.setattr(bucket, "makespan_us", lambda g, *_: sign * sum(n.op == "reshard" for n in g.nodes))
    made = Bucket().run(graph, TWO)
    assert len(tried) == 3
    assert max(tried) == tried[-1]
    assert (sum(n.op == "reshard" for n in made.nodes) < sum(n.op == "reshard" for n in graph.nodes)) == fewest


WIDE = """graph "g" mesh(shard=3)
op aten.mul.Tensor
param %a: f32[{numel}]<S0> "a" stage=3
param %b: f32[{numel}]<S0> "b" stage=3
input %x: f32[{numel}]<V>
fwd %a_full: f32[{numel}]<R> = reshard(%a) @ "first"
fwd %y: f32[{numel}]<V> = aten.mul.Tensor(%x, %a_full) @ "first"
fwd %b_full: f32[{numel}]<R> = reshard(%b) @ "second"
fwd %z: f32[{numel}]<V> = aten.mul.Tensor(%y, %b_full) @ "second"
return fwd output %z
"""


@pytest.mark.parametrize(
    ("latency_us", "num_bytes", "is_packed"),
    [(400.0, 600_000 - 12, True), (400.0, 600_000, False), (1.0, 65_532, True), (1.0, 65_544, False)],
)
def test_values_are_packed_whose_bytes_take_less_time_than_a_latency(latency_us, num_bytes, is_packed):
    """In 400 us a rank sends 400,000 bytes: two thirds of what three ranks gather then. Below 64 KiB all are packed."""
    line = AlphaBeta(latency_us=latency_us, bytes_per_s=1e9)
    costs = CostTable(hardware=hardware("cpu"), per_host=1, transfers={"all_gather": line})
    graph = parse_graph(WIDE.format(numel=num_bytes // 4))
    made = Bucket(max_bytes=1 << 22).run(graph, Context((Axis("shard", 3),), costs=costs))
    assert sum(n.op == "reshard" for n in made.nodes) == (1 if is_packed else 2)


@pytest.mark.parametrize(
    ("latency_us", "usual"),
    [(400.0, 20 * 600_000), (1.0, 128 << 10), (1e6, 256 << 20)],
    ids=["latencies", "two of the largest that are packed", "most"],
)
def test_sizes_around_the_one_that_makes_a_latency_small_are_tried(latency_us, usual, monkeypatch):
    line = AlphaBeta(latency_us=latency_us, bytes_per_s=1e9)
    costs = CostTable(hardware=hardware("cpu"), per_host=1, transfers={"all_gather": line})
    tried = list[int]()
    monkeypatch.setattr(Bucket, "groups", lambda self, graph, max_bytes, below: tried.append(max_bytes) or [])
    Bucket().run(parse_graph(WIDE.format(numel=6)), Context((Axis("shard", 3),), costs=costs))
    assert tried == [usual, usual // 4, 4 * usual]


def test_a_bucket_counts_as_what_its_first_member_is_for():
    made = Bucket(max_bytes=1000, pack_below_bytes=1000).run(parse_graph(WIDE.format(numel=6)), TWO)
    (reshard,) = [n for n in made.nodes if n.op == "reshard"]
    assert (reshard.origin.module, reshard.origin.made_by) == ("first", "bucket")


def four() -> Graph:
    """Four parameters of 24 bytes, each gathered and read by an op of its own."""
    params = "".join(f'param %{n}: f32[6]<S0> "{n}" stage=3\n' for n in "abcd")
    body = "".join(
        f"fwd %{n}_full: f32[6]<R> = reshard(%{n})\nfwd %{n}_x: f32[6]<V> = aten.mul.Tensor(%x, %{n}_full)\n"
        for n in "abcd"
    )
    outputs = "".join(f"return fwd output %{n}_x\n" for n in "abcd")
    head = 'graph "g" mesh(shard=2)\nop aten.mul.Tensor\n'
    return parse_graph(f"{head}{params}input %x: f32[6]<V>\n{body}{outputs}")


def test_each_bucket_is_filled_to_the_last_byte():
    """In buckets of 48 bytes, the second is as full as the first."""
    made = Bucket(max_bytes=48, pack_below_bytes=1000).run(four(), TWO)
    assert [len(n.operands) for n in made.nodes if n.op == "reshard"] == [2, 2]
