"""`fit` under random budgets: it fits wherever anything does, and the numbers stay what they are."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interp.models import captured
from tests.interp.ranks import Reference, context, differences
from zgraph.ir import Graph, verify
from zgraph.passes import Context, parse_recipe
from zgraph.passes.analysis.lookahead import peak_bytes
from zgraph.passes.fit import Fit

CHOICES = st.sampled_from(["auto", "never"])


@cache
def placed(name: str, num_ranks: int) -> Graph:
    return parse_recipe("canonicalize,partition(stage=3)").run(captured(name), context(num_ranks))


@cache
def reference(name: str) -> Reference:
    return Reference(captured(name), 2)


def extremes(graph: Graph, allowed: Context) -> dict[str, int]:
    """The peaks with everything kept, computed again, moved, and both, as far as that is allowed."""
    found = {"kept": peak_bytes(graph, allowed)}
    for again in {"never", "always" if allowed.recomputes == "auto" else "never"}:
        for moved in {"never", "always" if allowed.offloads == "auto" else "never"}:
            forced = replace(allowed, memory_budget=None, recomputes=again, offloads=moved)
            found[f"{again} {moved}"] = peak_bytes(Fit().run(graph, forced), allowed)
    return found


@pytest.mark.parametrize("name", ["llama", "convnet", "bf16", "tied"])
@given(recomputes=CHOICES, offloads=CHOICES, share=st.floats(-0.1, 1.1))
@settings(max_examples=12, deadline=None)
def test_it_fits_wherever_an_extreme_does(name, recomputes, offloads, share):
    graph = placed(name, 2)
    allowed = replace(context(2), recomputes=recomputes, offloads=offloads)
    peaks = extremes(graph, allowed)
    low, high = min(peaks.values()), peaks["kept"]
    budget = int(low + share * (high - low))
    found = Fit().run(graph, replace(allowed, memory_budget=budget))
    verify(found)
    assert peak_bytes(found, allowed) <= max(budget, low)
    if budget >= high:
        assert found == graph
    expected = reference(name)
    assert not differences(expected.expected(found, None), expected.run(found))
