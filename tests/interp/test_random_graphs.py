"""Random graphs give the same numbers whatever passes do to them, to the last bit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interp.ranks import Reference, context, differences
from tests.ir.strategies import FOREIGN, graphs
from zgraph.bridge.aten import effects, resolve
from zgraph.ir import OPS, DType, Graph, InputKind, verify
from zgraph.passes import RECIPES, parse_recipe
from zgraph.passes.analysis.order import reorder
from zgraph.passes.plan.zero_tangents import without_tangents

recipes = st.sampled_from([parse_recipe(text) for text in RECIPES.values()])
ranks = st.integers(1, 4)


def test_the_strategy_knows_the_effects_of_its_ops():
    for name, row in FOREIGN.items():
        assert effects(resolve(name), name, (), {}, multi=row.multi) == row


@settings(max_examples=150, deadline=None)
@given(graphs(), recipes, ranks, st.sampled_from([None, None, DType.f32, DType.f64]))
def test_every_pass_keeps_the_numbers(graph, pipeline, num_ranks, reduce_dtype):
    Reference(graph, num_ranks).check(pipeline, reduce_dtype)


@settings(max_examples=150, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES)), ranks, st.integers(1, 600))
def test_what_is_computed_again_has_the_same_numbers(graph, stage, num_ranks, keep_bytes):
    recipe = RECIPES[stage].replace("fit", f"recompute(keep_bytes={keep_bytes})")
    Reference(graph, num_ranks).check(parse_recipe(recipe))


@settings(max_examples=150, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES)), ranks, st.integers(1, 600), st.sampled_from([0, 200]))
def test_what_is_offloaded_has_the_same_numbers(graph, stage, num_ranks, num_bytes, keep_bytes):
    recipe = RECIPES[stage].replace(
        "fit", f"recompute(keep_bytes={keep_bytes}),offload(num_bytes={num_bytes},min_bytes=1)"
    )
    Reference(graph, num_ranks).check(parse_recipe(recipe))


@settings(max_examples=60, deadline=None)
@given(graphs(), recipes, st.sampled_from([(4, 2), (6, 2), (6, 3)]))
def test_shards_that_several_ranks_hold_keep_the_numbers(graph, pipeline, shape):
    num_ranks, num_copies = shape
    Reference(graph, num_ranks).check(pipeline, num_copies=num_copies)


@settings(max_examples=60, deadline=None)
@given(graphs(), recipes, ranks, st.randoms(use_true_random=False))
def test_any_order_that_dependencies_allow_keeps_the_numbers(graph, pipeline, num_ranks, random):
    reference = Reference(graph, num_ranks)
    after = pipeline.run(graph, context(num_ranks))
    priority = [random.random() for _ in after.nodes]
    mixed = reorder(after, lambda position, node: priority[position])
    assert not differences(reference.expected(mixed), reference.run(mixed))


@settings(max_examples=100, deadline=None)
@given(graphs(), recipes, ranks, st.data())
def test_tangents_left_out_are_zeros(graph, pipeline, num_ranks, data):
    tangents = [i.value.name for i in graph.inputs if i.kind is InputKind.tangent]
    absent = frozenset(data.draw(st.sets(st.sampled_from(tangents), min_size=1)))
    after = pipeline.run(graph, context(num_ranks))
    loss_only = without_tangents(after, absent)
    if loss_only is None:
        return
    verify(loss_only)
    assert collectives(loss_only) == collectives(after)
    reference = Reference(graph, num_ranks)
    for name in absent:
        reference.numbers.batch(0)[name] = [t * 0 for t in reference.numbers.batch(0)[name]]
    wanted, found = reference.run(after), reference.run(loss_only)
    for a, b in zip(wanted, found, strict=True):
        assert a is b is None or all((x == (0 if b is None else b[rank])).all() for rank, x in enumerate(a))


def collectives(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes if n.op in OPS and OPS[n.op].lane == "comm"]
