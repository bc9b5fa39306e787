"""Valid recipes on valid graphs are certified: random ones, on random graphs and on captured models."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks.prefetch import Prefetch
from tests.deep import DEEP
from tests.ir.strategies import graphs
from tests.trust.subjects import CLUSTER, LINE, SQUARE, SUBJECTS, run
from zgraph.certify.certificate import Certifier, certify
from zgraph.errors import BudgetError, VerifyError
from zgraph.ir import Axis, DType, Graph
from zgraph.passes import Context, parse_recipe

LOWER = "broadcast,all-gather{grouped},reduce-scatter{grouped},all-reduce,host-copies"
CAPTURED = ("llama, stage 0", "norms, stage 1", "drops, stage 2, recomputed", "tied llama, stage 3, fused")

flags = st.booleans()


@st.composite
def recipes(draw: Callable) -> str:
    """A valid recipe: the passes in an order that their contracts allow, with options."""
    stage = draw(st.integers(0, 3))
    steps = ["canonicalize"] * draw(flags)
    steps += [f"fuse(matmuls={draw(st.sampled_from(['never', 'auto', 'always']))})"] * draw(flags)
    steps += [f"partition(stage={stage})"]
    keep_bytes, num_bytes = draw(st.integers(0, 2000)), draw(st.integers(0, 4000))
    steps += draw(
        st.sampled_from(
            [
                [],
                ["fit"],
                [f"recompute(keep_bytes={keep_bytes})"],
                [f"offload(num_bytes={num_bytes})"],
                [f"recompute(keep_bytes={keep_bytes})", f"offload(num_bytes={num_bytes})"],
            ]
        )
    )
    steps += [f"keep(num_ahead={draw(st.integers(1, 3))})"] * draw(flags)
    max_bytes, below = draw(st.integers(1, 20_000)), draw(st.integers(0, 20_000))
    steps += draw(st.sampled_from([[], ["bucket"], [f"bucket(max_bytes={max_bytes},pack_below_bytes={below})"]]))
    steps += [LOWER.format(grouped=draw(st.sampled_from(["", "(grouped=true)"])))]
    steps += ["release"] if draw(st.integers(0, 3)) else []
    depth, ahead = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    steps += draw(st.sampled_from([[], [f"{Prefetch.name}(depth={depth})"], [f"schedule(num_ahead={ahead})"]]))
    steps += ["dce"] * draw(flags)
    return ",".join([*steps, *["arena(always=true)"] * draw(flags)])


contexts = st.builds(
    Context,
    mesh=st.sampled_from([(), LINE, SQUARE, (Axis("shard", 3),)]),
    reduce_dtype=st.sampled_from([None, None, DType.f32]),
    costs=st.just(CLUSTER),
    groups_calls=flags,
    keeps_blocks=flags,
    recomputes=st.sampled_from(["auto", "always", "never"]),
    offloads=st.sampled_from(["never", "always"]),
)


def certified(graph: Graph, recipe: str, context: Context) -> None:
    certifier = Certifier(graph, context, thorough=True)
    try:
        parse_recipe(recipe).run(graph, context, [certifier])
    except BudgetError:
        return
    certifier.finish()


@settings(max_examples=700 if DEEP else 100, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=graphs(), recipe=recipes(), context=contexts)
def test_random_recipes_on_random_graphs(graph, recipe, context):
    try:
        certify([("captured", graph)], context)
    except VerifyError:
        assume(False)  # strides that torch would not make
    certified(graph, recipe, context)


@pytest.mark.parametrize("subject", CAPTURED)
@settings(max_examples=75 if DEEP else 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipe=recipes(), context=contexts)
def test_random_recipes_on_captured_models(subject, recipe, context):
    assert subject in SUBJECTS
    certified(run(subject).graph("captured"), recipe, context)
