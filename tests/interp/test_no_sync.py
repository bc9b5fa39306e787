"""Micro-steps: what an unsynced backward leaves on each rank is in the mean of the step that follows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interp.models import captured
from tests.interp.ranks import Reference, context, differences
from tests.ir.strategies import graphs
from zgraph.aten import TO_TORCH
from zgraph.interp import Ranks, mean
from zgraph.ir import DType, Graph, Output, OutputKind, Phase
from zgraph.passes import RECIPES, parse_recipe
from zgraph.passes.no_sync import without_sync


def check_two_micro_steps(captured: Graph, recipe: str, num_ranks: int, reduce_dtype: DType | None = None) -> None:
    """The first without sync, its whole gradients held; the second averages the sums."""
    first = Reference(captured, num_ranks)
    second = first.next_batch()
    after = parse_recipe(recipe).run(captured, context(num_ranks, reduce_dtype))
    targets = {i.value.name: i.target for i in after.params}
    rest = {i.value.name: TO_TORCH[i.master or i.value.tensor.dtype] for i in after.params}
    held_targets = {n.option("target") for n in after.nodes if n.op == "accumulate"}

    def is_held(output: Output) -> bool:
        return output.kind is OutputKind.grad and targets.get(output.target) in held_targets

    def in_reduce_dtype(ranks: Ranks) -> Ranks:
        return [r.to(TO_TORCH[reduce_dtype]) if reduce_dtype else r for r in ranks]

    unsynced = first.run(without_sync(after))
    wanted = first.expected(after, reduce_dtype)
    held = {}
    for index, output in enumerate(captured.outputs):
        if is_held(output):
            wanted[index] = in_reduce_dtype(first.raw[index])
            held[targets[output.target]] = unsynced[index]
    assert held.keys() == held_targets
    assert not differences(wanted, unsynced)

    synced = second.run(after, held)
    wanted = second.expected(after, reduce_dtype)
    for index, output in enumerate(captured.outputs):
        if is_held(output):
            pairs = zip(in_reduce_dtype(first.raw[index]), in_reduce_dtype(second.raw[index]), strict=True)
            wanted[index] = [mean([a + b for a, b in pairs]).to(rest[output.target])] * num_ranks
    assert not differences(wanted, synced)


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize(("name", "reduce_dtype"), [("tied", None), ("mixed stages", None), ("bf16", DType.f32)])
def test_two_micro_steps_of_captured_models(name, reduce_dtype, stage):
    check_two_micro_steps(captured(name), RECIPES[stage], 3, reduce_dtype)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES.values())), st.integers(2, 3), st.sampled_from([None, DType.f64]))
def test_two_micro_steps_of_random_graphs(graph, recipe, num_ranks, reduce_dtype):
    check_two_micro_steps(graph, recipe, num_ranks, reduce_dtype)


def test_without_sync_of_stages_0_and_1_nothing_is_reduced():
    for stage, reductions in ((0, set()), (1, set()), (2, {"reduce_scatter_start"}), (3, {"reduce_scatter_start"})):
        graph = without_sync(parse_recipe(RECIPES[stage]).run(captured("tied"), context(2)))
        found = {n.op for n in graph.nodes} & {"reduce_scatter_start", "all_reduce_start", "accumulate"}
        assert found == reductions
        assert not graph.phase_nodes(Phase.update)
        assert all(o.phase is not Phase.update for o in graph.outputs)


def test_on_one_rank_nothing_changes():
    graph = parse_recipe(RECIPES[1]).run(captured("tied"), context(1))
    assert without_sync(graph) == graph
