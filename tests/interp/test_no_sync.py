"""Micro-steps: what an unsynced backward leaves on each rank is in the mean of the step that follows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interp.models import captured
from tests.interp.ranks import Reference, context, differences
from tests.ir.strategies import graphs
from zgraph.debugging.programs import MicroStep, Programs
from zgraph.ir import DType, Graph, Phase
from zgraph.passes import RECIPES, parse_recipe
from zgraph.passes.plan.no_sync import without_sync


def check_two_micro_steps(captured: Graph, recipe: str, num_ranks: int, reduce_dtype: DType | None = None) -> None:
    """The first without sync, its whole gradients held; the second averages the sums."""
    known = Reference(captured, num_ranks)
    after = parse_recipe(recipe).run(captured, context(num_ranks, reduce_dtype))
    course = (MicroStep(0, syncs=False), MicroStep(1))
    programs = Programs.of(after)
    training = known.training(after, programs)
    for at, step in enumerate(course):
        assert not differences(known.wanted(course, at, programs, reduce_dtype), training.run(step))
        held = {} if step.syncs else {n.option("target") for n in after.nodes if n.op == "accumulate"}
        assert training.interpreter.held.keys() == set(held)


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
