"""Bytes on the wire against the closed forms of the stages (Rajbhandari et al., ZeRO, SC 2020, section 7)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.cost import Traffic, traffic
from zgraph.ir import Axis, Graph, parse_graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe

SHAPES = ((8, 12), (12,), (24, 4), (16, 16), (4,))


def step(shapes: tuple[tuple[int, ...], ...]) -> Graph:
    """A step in which the forward and the backward both read every parameter."""
    kinds = [f"f32[{', '.join(map(str, shape))}]" for shape in shapes]
    lines = ['graph "step"', "op aten.read.default", "op aten.make.default"]
    lines += [f'param %w{i}: {kind} "w{i}"' for i, kind in enumerate(kinds)]
    lines += ["input %h0: f32[4]", f"tangent %t{len(kinds)}: f32[4]"]
    lines += [f"fwd %h{i + 1}: f32[4] = aten.read.default(%h{i}, %w{i})" for i in range(len(kinds))]
    for i in reversed(range(len(kinds))):
        lines.append(f"bwd %g{i}: {kinds[i]} = aten.make.default(%t{i + 1}, %h{i})")
        lines.append(f"bwd %t{i}: f32[4] = aten.read.default(%t{i + 1}, %w{i})")
    lines += [f"return fwd output %h{len(kinds)}"]
    lines += [f'return bwd grad "w{i}" %g{i}' for i in range(len(kinds))]
    return parse_graph("\n".join(lines))


def traffic_of(graph: Graph, recipe: str, num_ranks: int) -> tuple[Traffic, ...]:
    return traffic(make_plan(parse_recipe(recipe).run(graph, Context((Axis("shard", num_ranks),)))))


def numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        (0, {("all_reduce_start", "bwd"): 2}),
        (1, {("all_gather_start", "fwd"): 1, ("reduce_scatter_start", "upd"): 1}),
        (2, {("all_gather_start", "fwd"): 1, ("reduce_scatter_start", "bwd"): 1}),
        (3, {("all_gather_start", "fwd"): 1, ("all_gather_start", "bwd"): 1, ("reduce_scatter_start", "bwd"): 1}),
    ],
)
@pytest.mark.parametrize("buckets", ["bucket", "bucket(pack_below_bytes=1)", "bucket(max_bytes=1KiB)"])
def test_a_step_sends_what_its_stage_must(stage, rounds, num_ranks, buckets):
    """(N - 1) / N of all parameters each round. Every dimension divides; only in a bucket are chunks padded."""
    whole = sum(map(numel, SHAPES)) * 4
    found = traffic_of(step(SHAPES), RECIPES[stage].replace("bucket", buckets), num_ranks)
    sent = {(t.op, t.phase): t.sent_bytes for t in found}
    padding = 0 if "pack_below" in buckets else 16 * num_ranks * len(SHAPES)
    if num_ranks == 1:
        assert not found
        return
    assert sent.keys() == rounds.keys()
    for key, count in rounds.items():
        once = whole * (num_ranks - 1) // num_ranks
        assert count * once <= sent[key] <= count * (once + padding)


def test_calls_are_counted_by_kind_and_phase():
    alone = traffic_of(step(SHAPES), RECIPES[3].replace("bucket", "bucket(pack_below_bytes=1)"), 2)
    assert {(t.op, t.phase, t.num_calls) for t in alone} == {
        ("all_gather_start", "fwd", 5),
        ("reduce_scatter_start", "bwd", 5),
        ("all_gather_start", "bwd", 5),
    }
    together = traffic_of(step(SHAPES), RECIPES[3], 2)
    assert {t.num_calls for t in together} == {1}


def test_padding_is_sent_too():
    (forward, *_) = traffic_of(step(((5,),)), RECIPES[3], 4)
    assert forward == Traffic("all_gather_start", "fwd", 1, 3 * 2 * 4)  # 4 chunks of 2, to 3 other ranks


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES.values())), st.integers(1, 4))
def test_all_collectives_are_counted(graph, recipe, num_ranks):
    plan = make_plan(parse_recipe(recipe).run(graph, Context((Axis("shard", num_ranks),))))
    found = traffic(plan)
    assert sum(t.num_calls for t in found) == len(plan.collectives)
    assert len({(t.op, t.phase) for t in found}) == len(found)
    assert bool(found) <= (num_ranks > 1)
