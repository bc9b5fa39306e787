"""Arenas: nothing that is alive at one time lies in the same memory, and little is wasted."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prefetch import Prefetch
from tests.interp.models import NAMES, captured
from zgraph.cost import simulate_memory
from zgraph.errors import ContractError
from zgraph.ir import Axis, Phase, parse_graph, print_graph, verify
from zgraph.ir.arena import ALIGN_BYTES, Buffer, offsets
from zgraph.passes import RECIPES, Arena, Context, make_plan, parse_recipe
from zgraph.passes.arena import crowded_bytes, place, sizes
from zgraph.passes.dce import DeadCode

lives = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9)).map(
    lambda drawn: Buffer("", min(drawn[:2]), drawn[2] * ALIGN_BYTES, max(drawn[:2]))
)


@given(st.lists(lives, max_size=30))
def test_buffers_that_live_at_one_time_lie_apart(found):
    placed = place(found)
    assert sorted((b.node, b.last, b.num_bytes) for b in placed) == sorted((b.node, b.last, b.num_bytes) for b in found)
    for one, other in combinations(placed, 2):
        apart = one.offset + one.num_bytes <= other.offset or other.offset + other.num_bytes <= one.offset
        assert apart or not one.overlaps(other)
    size = max((b.offset + b.num_bytes for b in placed), default=0)
    alive = [sum(b.num_bytes for b in found if b.node <= now <= b.last) for now in range(41)]
    assert crowded_bytes(found) == max(alive)
    assert max(alive) <= size <= sum(b.num_bytes for b in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_arenas_of_captured_steps(name, stage, grouped):
    context = Context(mesh=(Axis("shard", 3),), groups_calls=grouped)
    plain = parse_recipe(RECIPES[stage]).run(captured(name), context)
    graph = Arena(always=True).run(plain, context)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    found = sizes(graph)
    assert all(s.crowded_bytes <= s.num_bytes <= 1.3 * s.crowded_bytes for s in found.values())
    assert Phase.forward in found or stage < 3
    before, after = (simulate_memory(make_plan(g), {}).peak.total_bytes for g in (plain, graph))
    assert after <= before + max((s.num_bytes for s in found.values()), default=0)


def test_the_graph_says_how_large_its_arenas_are():
    context = Context(mesh=(Axis("shard", 2),))
    plain = parse_recipe(RECIPES[3]).run(captured("llama"), context)
    graph = Arena(always=True).run(plain, context)
    assert not plain.arenas
    assert set(graph.arenas) == {Phase.forward, Phase.backward}
    without = make_plan(plain)
    assert {p.arena_bytes for p in (without.forward, without.backward, without.unsynced)} == {0}
    plan = make_plan(graph)
    assert plan.forward.arena_bytes == graph.arenas[Phase.forward]
    assert {p.arena_bytes for p in (plan.backward, plan.unsynced)} == {graph.arenas[Phase.backward]}
    assert all(offset % ALIGN_BYTES == 0 for node in graph.nodes for offset in offsets(node))


def test_what_is_dropped_later_makes_the_arena_smaller():
    text = """graph "g" mesh(shard=2)
    param %a: f32[256]<S0> "a" stage=3
    input %x: f32[128]<V>
    fwd %f: future f32[256]<R> = all_gather_start(%a)
    fwd %p: f32[128]<V> = pack(%x)
    fwd %full: f32[256]<R> = wait(%f)
    fwd %y: f32[256]<R> = copy(%full)
    return fwd output %y
    """
    whole = Arena(always=True).run(parse_graph(text), Context())
    assert whole.arenas == {Phase.forward: 1536}
    kept = DeadCode().run(whole, Context())
    assert kept.arenas == {Phase.forward: 1024}
    verify(kept)


def test_what_is_laid_out_is_not_laid_out_again_or_put_in_another_order():
    for recipe in ("arena,arena", "arena,schedule", f"arena,{Prefetch.name}"):
        with pytest.raises(ContractError, match="cannot follow a pass that makes a graph laid out"):
            parse_recipe(f"partition(stage=3),all-gather,{recipe}")


def test_a_budget_without_room_for_the_arena_goes_first():
    context = Context(mesh=(Axis("shard", 2),))
    plain = parse_recipe(RECIPES[0]).run(captured("llama"), context)
    peaks = [
        simulate_memory(make_plan(graph), {}).peak.total_bytes
        for graph in (plain, Arena(always=True).run(plain, context))
    ]
    assert peaks[0] < peaks[1]
    tight = Context(mesh=context.mesh, memory_budget=peaks[1] - 1)
    assert Arena(always=True).run(plain, tight) == plain
    roomy = Context(mesh=context.mesh, memory_budget=peaks[1])
    assert Arena(always=True).run(plain, roomy) != plain


def test_it_is_for_devices_whose_allocator_keeps_blocks():
    graph = parse_recipe(RECIPES[3]).run(captured("llama"), Context(mesh=(Axis("shard", 2),)))
    assert Arena().run(graph, Context()) == graph
    assert Arena().run(graph, Context(keeps_blocks=True)) == Arena(always=True).run(graph, Context())


def test_a_hole_that_is_large_enough_is_filled():
    lives = [(0, 1, 100), (1, 3, 80), (2, 3, 40), (2, 3, 60)]
    placed = place([Buffer(str(number), born, num_bytes, last) for number, (born, last, num_bytes) in enumerate(lives)])
    assert {b.name: b.offset for b in placed} == {"0": 0, "1": 100, "3": 0, "2": 60}
