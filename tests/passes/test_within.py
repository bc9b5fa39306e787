"""A budget that is refused names the smallest that can: with it the passes fit, with a byte less they do not."""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from tests.interp.models import captured
from tests.ir.strategies import graphs
from zgraph.errors import BudgetError, ContractError, VerifyError
from zgraph.ir import Axis, Graph, parse_graph
from zgraph.passes import RECIPES, Context, Pass, Pipeline, parse_recipe
from zgraph.passes.core.budgeted import Budgeted
from zgraph.passes.core.instruments import Log, Verify
from zgraph.passes.plan.make_plan import memory_of

MESHES = ((), (Axis("shard", 2),), (Axis("shard", 3),), (Axis("replicate", 2), Axis("shard", 2)))
CHOICES = st.sampled_from(["never", "auto", "always"])
MORE = tuple(recipe.replace("fit,", "fit,recompute(keep_bytes=256),") for recipe in RECIPES.values()) + tuple(
    recipe.replace("bucket,", "bucket(pack_below_bytes=1),").replace("arena", "arena(always=true)")
    for recipe in RECIPES.values()
)


def needed(recipe: str, graph: Graph, context: Context, budget: int) -> int | None:
    """The smallest budget, as the refusal of a smaller one says; None where it is none."""
    limited = replace(context, memory_budget=budget)
    try:
        found = parse_recipe(recipe).run(graph, limited)
    except BudgetError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert f"{refusal.needed_bytes:,} is the smallest that can" in str(refusal)
        assert refusal.needed_bytes > budget
        return refusal.needed_bytes
    peak = memory_of(found, {}).peak.total_bytes
    assert max(peak, context.update_bytes) <= budget - context.rest_bytes
    return None


def check(recipe: str, graph: Graph, context: Context) -> int:
    """The smallest budget, which is looked at from both sides."""
    least = needed(recipe, graph, context, context.rest_bytes - 1)
    assert least is not None
    assert needed(recipe, graph, context, least) is None
    assert needed(recipe, graph, context, least - 1) == least
    return least


@settings(max_examples=300 if DEEP else 25, deadline=None)
@given(
    graph=graphs(),
    recipe=st.sampled_from([*RECIPES.values(), *MORE]),
    mesh=st.sampled_from(MESHES),
    rest=st.integers(0, 1000),
    update=st.integers(0, 2000),
    grouped=st.booleans(),
    blocks=st.booleans(),
    recomputes=CHOICES,
    offloads=CHOICES,
    share=st.floats(0, 2),
)
def test_the_smallest_budget_of_random_graphs(
    graph, recipe, mesh, rest, update, grouped, blocks, recomputes, offloads, share
):
    context = Context(
        mesh=mesh,
        rest_bytes=rest,
        update_bytes=update,
        groups_calls=grouped,
        keeps_blocks=blocks,
        recomputes=recomputes,
        offloads=offloads,
    )
    least = check(recipe, graph, context)
    other = int(share * least)
    assert needed(recipe, graph, context, other) in ((None,) if other >= least else (None, least))


OPTIONS = ({}, {"offloads": "auto"}, {"groups_calls": True, "keeps_blocks": True})
FEW = tuple(zip((0, 2, 3), OPTIONS, strict=True))
CELLS = tuple(product(RECIPES, OPTIONS)) if DEEP else FEW


@pytest.mark.parametrize(("stage", "options"), CELLS, ids=str)
def test_the_smallest_budget_of_a_llama(stage, options):
    graph, context = captured("llama"), Context(mesh=MESHES[1], rest_bytes=10_000, **options)
    least = check(RECIPES[stage], graph, context)
    for more in (1, 64, 500, 1000, 3000) if DEEP else (64, 1000):
        assert needed(RECIPES[stage], graph, context, least + more) is None
    for fewer in (100, 1024) if DEEP else (1024,):
        assert needed(RECIPES[stage], graph, context, least - fewer) == least


def test_it_is_named_where_the_optimizers_step_takes_the_most():
    graph, context = captured("tied"), Context(mesh=MESHES[1], rest_bytes=10_000, update_bytes=5001)
    with pytest.raises(BudgetError, match=r"with 10,000 at rest and 5,001 at its peak \(the optimizer's step\)"):
        parse_recipe(RECIPES[3]).run(graph, replace(context, memory_budget=12_000))
    assert check(RECIPES[3], graph, context) == 15_001


def test_instruments_are_told_of_the_way_that_fits_and_once():
    graph, context = captured("llama"), Context(mesh=MESHES[1])
    least = check(RECIPES[0], graph, context)
    log = Log()
    parse_recipe(RECIPES[0]).run(graph, replace(context, memory_budget=least), [log, Verify()])
    assert [step.text.partition("(")[0] for step in log.steps] == [p.name for p in parse_recipe(RECIPES[0]).passes]
    refused = Log()
    with pytest.raises(BudgetError):
        parse_recipe(RECIPES[0]).run(graph, replace(context, memory_budget=least - 1), [refused])
    names = [step.text.partition("(")[0] for step in refused.steps]
    assert names == [p.name for p in parse_recipe(RECIPES[0]).passes if p.name not in ("schedule", "dce", "arena")]


@dataclass(frozen=True)
class Breaks(Pass):
    """Raises an error, or makes a graph that is not valid."""

    error: Exception | None = None
    name: ClassVar[str] = "breaks"

    def run(self, graph: Graph, context: Context) -> Graph:
        if self.error is not None:
            raise self.error
        return graph.with_nodes(graph.nodes[1:])


def test_other_errors_are_what_they_are_with_a_budget_too():
    graph, context = captured("tied"), Context(memory_budget=1 << 30)
    log = Log()
    with pytest.raises(ContractError, match="broken"):
        Pipeline((*parse_recipe("canonicalize").passes, Breaks(ContractError("broken")))).run(graph, context, [log])
    assert [step.text for step in log.steps] == ["canonicalize"]
    broken = Pipeline((*parse_recipe("canonicalize").passes, Breaks(), *parse_recipe("dce").passes))
    with pytest.raises(VerifyError, match="after the pass breaks"):
        broken.run(graph, context, [Verify()])


def test_the_next_limit_is_lower_by_what_the_step_was_over_the_last():
    """Beside what is there anyhow; none where the step was within it, or is over it by more than all of it."""
    trials = Budgeted((), parse_graph('graph "g"\n'), Context(memory_budget=1000, rest_bytes=10))
    found = [trials.lower(100, BudgetError("", 10 + needed_bytes)) for needed_bytes in (90, 100, 101, 130, 199, 201)]
    assert found == [None, None, 99, 70, 1, None]
