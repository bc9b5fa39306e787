"""Decisions of passes, measured by what follows from them: bytes, nodes and numbers, not the text of a whole graph."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import zgraph
from tests.interp.models import captured
from tests.interp.ranks import Reference
from tests.ir.strategies import graphs
from tests.passes.test_goldens import FOLDER, Golden
from zgraph.codegen import reference
from zgraph.codegen.spec import KernelSpec
from zgraph.cost import CostTable, hardware
from zgraph.cost.hardware import Link
from zgraph.cost.table import AlphaBeta
from zgraph.errors import BudgetError
from zgraph.ir import OPS, Axis, DType, Graph, Node, Phase, TensorType, parse_graph, verify
from zgraph.ir.aliases import Memory
from zgraph.ir.external_ops import LOSS, LOSS_BACKWARD, MATMUL, PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD, ROWS
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.all_gather import AllGather
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import lowered, makespan_us, peak_bytes
from zgraph.passes.analysis.timetable import run
from zgraph.passes.bucket import Bucket
from zgraph.passes.dce import DeadCode
from zgraph.passes.fit import Fit, _Fitter
from zgraph.passes.fuse import Fuse
from zgraph.passes.fuse import candidates as fuse_candidates
from zgraph.passes.fusion.candidates import Candidates
from zgraph.passes.host_copies import HostCopies
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload, Saved
from zgraph.passes.partition import Partition
from zgraph.passes.plan.make_plan import memory_of
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents
from zgraph.passes.recompute import Recompute
from zgraph.passes.reduce_scatter import ReduceScatter
from zgraph.passes.release import Release
from zgraph.passes.schedule import LoweredStep, Schedule

TWO = Context((Axis("shard", 2),))

TWO_LAYERS = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %a: f32[64]<S0> "a" stage=3
param %b: f32[64]<S0> "b" stage=3
input %x: f32[64]<V>
tangent %t: f32[64]<V>
fwd %af: f32[64]<R> = reshard(%a)
fwd %y: f32[64]<V> = aten.mul.Tensor(%x, %af)
fwd %bf: f32[64]<R> = reshard(%b)
fwd %z: f32[64]<V> = aten.mul.Tensor(%y, %bf)
bwd %b_again: f32[64]<R> = reshard(%b)
bwd %ty: f32[64]<V> = aten.mul.Tensor(%t, %b_again)
bwd %gb: f32[64]<V> = aten.mul.Tensor(%t, %y)
bwd %gb_pending: f32[64]<P(mean)> = pending(%gb, reduce="mean")
bwd %gb_mean: f32[64]<S0> = reshard(%gb_pending)
bwd %a_again: f32[64]<R> = reshard(%a)
bwd %tx: f32[64]<V> = aten.mul.Tensor(%ty, %a_again)
bwd %ga: f32[64]<V> = aten.mul.Tensor(%ty, %x)
bwd %ga_pending: f32[64]<P(mean)> = pending(%ga, reduce="mean")
bwd %ga_mean: f32[64]<S0> = reshard(%ga_pending)
return fwd output %z
return bwd grad "a" %ga_mean
return bwd grad "b" %gb_mean
return bwd grad "x" %tx
"""

BUCKETS = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %a: f32[4]<S0> "a" stage=2
param %b: f32[4]<S0> "b" stage=2
input %x: f32[4]<V>
tangent %t: f32[4]<V>
fwd %af: f32[4]<R>, %bf: f32[4]<R> = reshard(%a, %b)
fwd %y: f32[4]<V> = aten.mul.Tensor(%x, %af)
fwd %z: f32[4]<V> = aten.mul.Tensor(%y, %bf)
bwd %gb: f32[4]<V> = aten.mul.Tensor(%t, %y)
bwd %ga: f32[4]<V> = aten.mul.Tensor(%t, %x)
bwd %ga_pending: f32[4]<P(mean)> = pending(%ga, reduce="mean")
bwd %gb_pending: f32[4]<P(mean)> = pending(%gb, reduce="mean")
bwd %a_mean: f32[4]<S0>, %b_mean: f32[4]<S0> = reshard(%ga_pending, %gb_pending)
return fwd output %z
return bwd grad "a" %a_mean
return bwd grad "b" %b_mean
"""


def of_op(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op == op]


# --- grouped calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AllGather, ReduceScatter])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("able", [False, True])
def test_a_bucket_is_one_grouped_call_where_the_option_or_the_runtime_says_so(kind, asked, able):
    after = kind(grouped=asked).run(parse_graph(BUCKETS), replace(TWO, groups_calls=able))
    verify(after)
    (start,) = of_op(after, "all_gather_start" if kind is AllGather else "reduce_scatter_start")
    if asked or able:
        assert (len(start.operands), len(of_op(after, "wait")), of_op(after, "pack")) == (2, 2, [])
    else:
        assert (len(start.operands), len(of_op(after, "wait")), len(of_op(after, "pack"))) == (1, 1, 1)


# --- memory budgets ------------------------------------------------------------------------------------------------


def compiled(name: str, stage: int, context: Context) -> Graph:
    return parse_recipe(RECIPES[stage]).run(captured(name), context)


def smallest(name: str, stage: int, context: Context) -> int:
    """The smallest budget, as the refusal of one that is far too small says."""
    with pytest.raises(BudgetError) as refused:
        compiled(name, stage, replace(context, memory_budget=context.rest_bytes))
    return int(str(refused.value).split(" is the smallest that can")[0].split()[-1].replace(",", ""))


@pytest.mark.parametrize("stage", RECIPES)
def test_the_smallest_budget_that_a_refusal_names_is_enough_and_a_byte_less_is_not(stage):
    context = replace(TWO, rest_bytes=10_000)
    least = smallest("tied", stage, context)
    after = compiled("tied", stage, replace(context, memory_budget=least))
    assert memory_of(after, {}).peak.total_bytes <= least - context.rest_bytes
    with pytest.raises(BudgetError, match=f"{least:,} is the smallest that can"):
        compiled("tied", stage, replace(context, memory_budget=least - 1))


def test_the_optimizers_step_may_be_what_does_not_fit():
    context = replace(TWO, rest_bytes=10_000, update_bytes=1_000_000)
    assert smallest("tied", 3, context) == 1_010_000
    compiled("tied", 3, replace(context, memory_budget=1_010_000))
    with pytest.raises(BudgetError, match=r"1,000,000 at its peak \(the optimizer's step\)"):
        compiled("tied", 3, replace(context, memory_budget=1_009_999))


def test_a_step_without_collectives_is_held_to_its_budget_too():
    text = "\n".join(line for line in TWO_LAYERS.splitlines() if "reshard" not in line and "param" not in line)
    alone = parse_graph(
        text.replace(" mesh(shard=2)", "")
        .replace("<V>", "")
        .replace("%af", "%x")
        .replace("%bf", "%x")
        .replace("%b_again", "%x")
        .replace("%a_again", "%x")
        .replace('return bwd grad "a" %ga_mean\n', "")
        .replace('return bwd grad "b" %gb_mean\n', "")
    )
    least = memory_of(alone, {}).peak.total_bytes
    assert Schedule().run(alone, Context(memory_budget=least)) is alone
    with pytest.raises(BudgetError):
        Schedule().run(alone, Context(memory_budget=least - 1))


def gathers_again(graph: Graph) -> int:
    return sum(n.name.endswith("_again") for n in of_op(graph, "reshard"))


def least_budget(num_ahead: int, num_again: int) -> int:
    """The smallest budget in which no more than so many parameters are gathered again."""
    graph = parse_graph(TWO_LAYERS)
    least = peak_bytes(graph, TWO)
    budgets = (replace(TWO, memory_budget=n) for n in range(least, least + 5000, 4))
    return next(c.memory_budget for c in budgets if gathers_again(Keep(num_ahead).run(graph, c)) <= num_again)


@pytest.mark.parametrize("num_again", [0, 1])
@pytest.mark.parametrize("num_ahead", [1, 2])
def test_what_is_kept_leaves_room_for_what_runs_ahead(num_ahead, num_again):
    """A budget must be larger by exactly what may run ahead."""
    ahead_bytes = lowered(parse_graph(TWO_LAYERS), TWO).ahead_bytes(num_ahead)
    assert ahead_bytes >= 256 * num_ahead
    assert least_budget(num_ahead, num_again) == least_budget(0, num_again) + ahead_bytes


@pytest.mark.parametrize("num_again", [0, 1])
def test_what_is_kept_fits_the_budget(num_again):
    graph, budget = parse_graph(TWO_LAYERS), least_budget(0, num_again)
    kept = Keep(0).run(graph, replace(TWO, memory_budget=budget))
    assert peak_bytes(kept, TWO) <= budget


def test_without_a_budget_nothing_is_kept():
    assert gathers_again(Keep().run(parse_graph(TWO_LAYERS), TWO)) == 2


# --- schedule ------------------------------------------------------------------------------------------------------


def scheduled() -> tuple[Graph, Graph]:
    """A step before and after it is scheduled."""
    graph = parse_graph(TWO_LAYERS)
    for kind in (AllGather, ReduceScatter, Release):
        graph = kind().run(graph, TWO)
    return graph, Schedule().run(graph, TWO)


def under_way(graph: Graph) -> dict[str, int]:
    """For each collective how many ops of the model run between its start and its wait."""
    at = {n.name: p for p, n in enumerate(graph.nodes) if n.results}
    computes = [n.op not in OPS for n in graph.nodes]
    waits = of_op(graph, "wait")
    return {w.name: sum(computes[at[w.operands[0].name] : at[w.name]]) for w in waits}


def test_collectives_run_while_something_is_computed():
    before, after = scheduled()
    assert set(under_way(before).values()) == {0}
    hidden = under_way(after)
    assert hidden["bf"] >= 1, "the next gather of the forward"
    assert hidden["a_again"] >= 1, "the next gather of the backward"
    assert hidden["gb_mean"] >= 1, "a reduction"


RETURNED = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %w: f32[8388608]<S0> "w" stage=3
param %a: f32[256]<S0> "a" stage=3
input %x: f32[4194304]<V>
fwd %w_full: f32[8388608]<R> = reshard(%w)
fwd %y: f32[4194304]<V> = aten.mul.Tensor(%x, %x)
fwd %a_full: f32[256]<R> = reshard(%a)
fwd %z: f32[4194304]<V> = aten.mul.Tensor(%y, %a_full)
return fwd output %z
return fwd output %w_full
"""


def test_a_parameter_that_is_returned_is_gathered_last_where_the_budget_is_short():
    """On a network so fast that the clock would let it pass the other."""
    line = AlphaBeta(latency_us=1.0, bytes_per_s=1e12)
    costs = CostTable(hardware=hardware("cpu"), per_host=1, transfers={"all_gather": line})
    context = replace(TWO, costs=costs)
    graph = Release().run(AllGather().run(parse_graph(RETURNED), context), context)
    least = memory_of(LoweredStep(graph, context).canonical(), {}).peak.total_bytes
    after = Schedule().run(graph, replace(context, memory_budget=least))
    assert [n.name for n in of_op(after, "all_gather_start")] == ["a_full_start", "w_full_start"]
    roomy = Schedule().run(graph, replace(context, memory_budget=2 * least))
    assert under_way(roomy)["w_full"] > under_way(after)["w_full"] == 0


LONG_BACKWARD = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %w: f32[1048576]<S0> "w" stage=2
input %x: f32[1048576]<V>
tangent %t: f32[1048576]<V>
fwd %y: f32[1048576]<V> = aten.mul.Tensor(%x, %x)
bwd %g: bf16[1048576]<V> = aten.mul.Tensor(%t, %x)
bwd %p: bf16[1048576]<P(mean)> = pending(%g, reduce="mean")
bwd %s: future bf16[1048576]<S0> = reduce_scatter_start(%p)
bwd %m: bf16[1048576]<S0> = wait(%s)
bwd %c: f32[1048576]<S0> = cast(%m, dtype=f32)
"""


def test_a_reduction_is_waited_for_when_it_is_over_with_the_casts_of_its_result():
    made = ["x", *(f"u{n}" for n in range(60))]
    ops = [f"bwd %{name}: f32[1048576]<V> = aten.mul.Tensor(%t, %{read})\n" for read, name in itertools.pairwise(made)]
    outputs = f'return fwd output %y\nreturn bwd grad "w" %c\nreturn bwd grad "x" %{made[-1]}\n'
    graph = parse_graph(LONG_BACKWARD + "".join(ops) + outputs)
    verify(graph)
    step = LoweredStep(graph, TWO)
    (collective,), (transfer,) = step.collectives, step.transfers
    assert [graph.nodes[p].name for p in collective.after] == ["m", "c"]
    found = run(step.problem(step.headroom(2)), (0,), (transfer.first,))
    op_us = TWO.costs.node_us(graph, graph.nodes[-1], {})
    for slack in (0.0, 1.0):
        _, _, waits = step.waits(step.problem(step.headroom(2)), found, slack)
        lasts = (waits[0] - transfer.first) * op_us / transfer.us
        assert 1 + slack - op_us / transfer.us <= lasts <= 1 + slack + 2 * op_us / transfer.us


def test_a_step_stays_as_it_came_where_only_that_fits():
    """The gradient of a shard is cast late, when a large value is gone; usually it is cast as soon as it is there."""
    cast = "bwd %c: f32[1048576]<S0> = cast(%m, dtype=f32)\n"
    large = "bwd %u: f32[1048576]<V> = aten.mul.Tensor(%t, %x)\nbwd %v: f32[1048576]<V> = aten.mul.Tensor(%u, %u)\n"
    outputs = 'return fwd output %y\nreturn bwd grad "w" %c\nreturn bwd output none\n'
    used = "bwd %e: f32[1]<V> = aten.mul.Tensor(%v, %v)\n"
    graph = parse_graph(LONG_BACKWARD.replace(cast, large + used + cast) + outputs)
    verify(graph)
    needed, usual = (memory_of(g, {}).peak.total_bytes for g in (graph, LoweredStep(graph, TWO).canonical()))
    assert needed < usual
    for budget, is_kept in ((needed, True), (usual - 1, True), (usual, False), (None, False)):
        found, curve = LoweredStep(graph, replace(TWO, memory_budget=budget)).plain
        assert (found is graph) == is_kept
        assert curve.peak.total_bytes == (needed if is_kept else usual)


def test_the_casts_of_what_is_gathered_are_computed_where_they_stand():
    text = (
        TWO_LAYERS.replace(
            "fwd %y: f32[64]<V> = aten.mul.Tensor(%x, %af)",
            "fwd %ac: f32[64]<R> = cast(%af, dtype=f32)\nfwd %y: f32[64]<V> = aten.mul.Tensor(%x, %ac)",
        )
        .replace("%af: f32", "%af: bf16")
        .replace("%a: f32[64]<S0>", "%a: bf16[64]<S0>")
    )
    graph = parse_graph(text)
    step = LoweredStep(AllGather().run(graph, TWO), TWO)
    after = {step.graph.nodes[p].name for c in step.collectives if c.is_gather for p in c.after}
    assert "af" in after
    assert "ac" not in after


UNEVEN = """graph "g" mesh(shard=2)
op aten.mul.Tensor
op aten.t.default views(0)
param %w: f32[5, 3]<S0> "w" stage=2
input %x: f32[5, 3]<V>
tangent %t: f32[5, 3]<V>
fwd %y: f32[5, 3]<V> = aten.mul.Tensor(%x, %x)
bwd %g: f32[{shape}]<V> = aten.mul.Tensor(%t, %x)
bwd %p: f32[{shape}]<P(mean)> = pending(%g, reduce="mean")
bwd %s: future f32[{shape}]<S0> = reduce_scatter_start(%p)
bwd %m: f32[{shape}]<S0> = wait(%s)
bwd %gx: f32[5, 3]<V> = aten.mul.Tensor(%t, %y)
return fwd output %y
return bwd grad "w" %m
return bwd grad "x" %gx
"""


@pytest.mark.parametrize(
    ("rows", "whole_bytes", "copied_bytes"),
    [(4, 4 * 3 * 4, 0), (5, 6 * 3 * 4, 6 * 3 * 4)],
    ids=["even", "padded"],
)
def test_a_reduction_holds_the_gradient_a_padded_copy_and_where_it_lands(rows, whole_bytes, copied_bytes):
    text = UNEVEN.replace("{shape}", "5, 3").replace("5, 3", f"{rows}, 3")
    step = LoweredStep(parse_graph(text), TWO)
    (transfer,) = step.transfers
    (start,) = of_op(step.graph, "reduce_scatter_start")
    scratch = OPS[start.op].scratch_bytes(start, step.graph.mesh)
    assert transfer.num_bytes == scratch + whole_bytes + copied_bytes


# --- buckets -------------------------------------------------------------------------------------------------------


def test_a_bucket_that_exists_is_left_as_it_is():
    """Also one of two, with room in it and a third value to put there."""
    third = BUCKETS.replace("input %x", 'param %c: f32[4]<S0> "c" stage=2\ninput %x').replace(
        "fwd %z: f32[4]<V> = aten.mul.Tensor(%y, %bf)",
        "fwd %cf: f32[4]<R> = reshard(%c)\nfwd %u: f32[4]<V> = aten.mul.Tensor(%y, %cf)\n"
        "fwd %z: f32[4]<V> = aten.mul.Tensor(%u, %bf)",
    )
    graph = parse_graph(third)
    verify(graph)
    assert Bucket(max_bytes=1000, pack_below_bytes=1000).run(graph, TWO) == graph


def test_two_values_are_a_bucket():
    after = Bucket(max_bytes=512, pack_below_bytes=512).run(parse_graph(TWO_LAYERS), TWO)
    assert sorted(len(n.results) for n in of_op(after, "reshard")) == [2, 2, 2]


@pytest.mark.parametrize(("max_bytes", "sizes"), [(511, [1] * 6), (512, [2] * 3)])
def test_a_bucket_is_full_at_its_size(max_bytes, sizes):
    after = Bucket(max_bytes=max_bytes, pack_below_bytes=512).run(parse_graph(TWO_LAYERS), TWO)
    assert [len(n.results) for n in of_op(after, "reshard")] == sizes


@pytest.mark.parametrize(("below_bytes", "num_reshards"), [(256, 6), (257, 3)])
def test_values_of_the_size_asked_for_are_left_alone(below_bytes, num_reshards):
    after = Bucket(max_bytes=1000, pack_below_bytes=below_bytes).run(parse_graph(TWO_LAYERS), TWO)
    assert len(of_op(after, "reshard")) == num_reshards


def test_where_no_bucketing_fits_it_is_the_one_that_takes_least():
    graph = parse_graph(TWO_LAYERS)
    after = Bucket().run(graph, replace(TWO, memory_budget=1))
    verify(after)
    merged = Bucket(max_bytes=1 << 20, pack_below_bytes=1 << 20).run(graph, TWO)
    assert peak_bytes(graph, TWO) < peak_bytes(merged, TWO)
    assert peak_bytes(after, TWO) == peak_bytes(graph, TWO)


def test_a_bucket_is_made_where_the_budget_just_holds_it_and_no_lower():
    graph = parse_graph(TWO_LAYERS)
    needed = peak_bytes(Bucket().run(graph, TWO), TWO)
    assert len(of_op(Bucket().run(graph, replace(TWO, memory_budget=needed)), "reshard")) == 3
    assert Bucket().run(graph, replace(TWO, memory_budget=needed - 1)) == graph


# --- partition -----------------------------------------------------------------------------------------------------

NUMBERS = """graph "g"
op aten.mul.Tensor
param %w: f32[4] "w"
input %s: int(s0)
input %x: f32[4]
tangent %t: f32[4]
fwd %y: f32[4] = aten.mul.Tensor(%x, %w)
fwd %z: f32[4] = aten.mul.Tensor(%y, %s)
bwd %g: f32[4] = aten.mul.Tensor(%t, %s)
return fwd output %z
return bwd grad "w" %g
return bwd output none
return bwd output none
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", RECIPES)
def test_inputs_that_are_numbers_stay_what_they_are(stage, num_ranks):
    context = Context((Axis("shard", num_ranks),))
    for graph in (parse_graph(NUMBERS), captured("dynamic")):
        after = Partition(stage).run(graph, context)
        verify(after)
        numbers = [i for i in graph.inputs if not isinstance(i.value.type, TensorType)]
        assert numbers
        assert [i for i in after.inputs if not isinstance(i.value.type, TensorType)] == numbers
        tensors = [i.value.tensor for i in after.inputs if isinstance(i.value.type, TensorType)]
        assert all(bool(t.placement) == (num_ranks > 1) for t in tensors)


# --- recompute -----------------------------------------------------------------------------------------------------

CHAIN = """graph "g"
op aten.exp.default
op aten.mm.default
op aten.mul.Tensor
param %w: f32[8, 8] "w" stage=0
input %x: f32[8, 8]
tangent %t: f32[8, 8]
fwd %y: f32[8, 8] = aten.mm.default(%x, %w)
fwd %a: f32[8, 8] = aten.exp.default(%y)
fwd %b: f32[8, 8] = aten.exp.default(%a)
fwd %z: f32[8, 8] = aten.mul.Tensor(%b, %y)
bwd %p: f32[8, 8] = aten.mul.Tensor(%t, %b)
bwd %q: f32[8, 8] = aten.mul.Tensor(%p, %a)
bwd %r: f32[8, 8] = aten.mul.Tensor(%q, %y)
return fwd output %z
return bwd grad "x" %r
"""


def again(graph: Graph) -> list[str]:
    return sorted(n.name for n in graph.phase_nodes(Phase.backward) if n.name.endswith("_again"))


@pytest.mark.parametrize(
    ("keep_bytes", "num_again"),
    [(3 * 256, 0), (3 * 256 - 1, 1), (2 * 256, 1), (2 * 256 - 1, 2), (256, 2)],
)
def test_what_does_not_fit_is_computed_again_and_no_more(keep_bytes, num_again):
    """Three values of 256 bytes wait for the backward, of which the first, a matmul's, is kept the longest."""
    after = Recompute(keep_bytes).run(parse_graph(CHAIN), Context())
    verify(after)
    assert len(again(after)) == num_again
    assert "y_again" not in again(after)
    made = {r.name for n in after.phase_nodes(Phase.forward) for r in n.results}
    saved = [v for v in make_plan(after).saved if v.name in made]
    assert 256 * len(saved) <= keep_bytes


def test_only_what_is_marked_is_computed_again_where_nothing_is_said():
    graph = parse_graph(CHAIN)
    assert Recompute().run(graph, Context()) is graph


def test_a_graph_without_a_backward_computes_nothing_again():
    lines = [line for line in CHAIN.splitlines() if "bwd" not in line and "tangent" not in line]
    graph = parse_graph("\n".join(lines) + "\n")
    assert Recompute(1).run(graph, Context()) is graph
    assert Recompute().run(graph, Context()) is graph
    marked = graph.with_nodes([replace(n, checkpoint=1) for n in graph.nodes])
    assert Recompute().run(marked, Context()) is marked


# --- fit -----------------------------------------------------------------------------------------------------------


def test_a_step_that_just_fits_is_left_as_it_is():
    graph = parse_recipe("canonicalize,partition(stage=3)").run(captured("llama"), TWO)
    peak = peak_bytes(graph, TWO)
    assert Fit().run(graph, replace(TWO, memory_budget=peak)) is graph
    assert Fit().run(graph, replace(TWO, memory_budget=peak - 1)) != graph


def test_all_that_just_fits_is_kept():
    graph = parse_recipe("canonicalize,partition(stage=3)").run(captured("llama"), TWO)
    fitter = _Fitter(Forward(graph, TWO), peak_bytes(graph, TWO))
    assert fitter.best(0) is fitter.trial(None, 0)


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("bytes_per_s", [1e5, 1e7, 1e12])
def test_no_step_that_moves_is_faster_than_what_ends_the_search(name, bytes_per_s):
    """`fit` tries no larger amount where a bound says that it is slower: it must be a bound."""
    graph = parse_recipe("canonicalize,partition(stage=3)").run(captured(name), TWO)
    link = Link(bytes_per_s=bytes_per_s, latency_us=1.0)
    machine = hardware("cpu").model_copy(update={"host_link": link})
    context = replace(TWO, costs=CostTable(hardware=machine, per_host=1), offloads="auto")
    saved = Saved(graph, context, 1)
    moved = saved.offloading(saved.first(1 << 40))
    limit = peak_bytes(moved, context)
    fitter = _Fitter(Forward(graph, context), limit)
    assert makespan_us(moved, context) >= fitter.least_us(1 << 40) >= fitter.forward.us
    leaving = peak_bytes(graph, context) - limit
    late_bytes = leaving - fitter.forward.hidden_bytes
    assert (fitter.least_us(1 << 40) > fitter.forward.us) == (late_bytes > 0)
    assert fitter.least_us(0) == fitter.forward.us


@given(
    fits_at=st.integers(0, 10_000),
    over_at=st.integers(0, 10_000),
    target=st.integers(100, 10_000),
    below=st.integers(0, 100),
    above=st.integers(1, 10_000),
    number=st.integers(0, 5),
)
def test_the_search_goes_on_between_what_fits_and_what_does_not(fits_at, over_at, target, below, above, number):
    assume(abs(over_at - fits_at) >= 64)
    fitter = object.__new__(_Fitter)
    fitter.target = target
    fits, over = SimpleNamespace(peak_bytes=target - below), SimpleNamespace(peak_bytes=target + above)
    found = fitter.between(fits, fits_at, over, over_at, number)
    assert min(fits_at, over_at) < found < max(fits_at, over_at)


@given(kept=st.integers(1000, 5000), target=st.integers(2000, 6000), number=st.sampled_from([0, 1, 3, 4]))
def test_a_guess_from_the_closer_side_takes_a_byte_for_a_byte(kept, target, number):
    """Where each byte that is kept is one at the peak, it is right at once."""
    fitter = object.__new__(_Fitter)
    fitter.target = target
    lower, higher = kept, kept + 1000
    base = target - kept - 300
    fits, over = SimpleNamespace(peak_bytes=base + lower), SimpleNamespace(peak_bytes=base + higher)
    assert abs(fitter.between(fits, lower, over, higher, number) - (target - base)) <= 1
    base = target - kept - 700
    fits, over = SimpleNamespace(peak_bytes=base + lower), SimpleNamespace(peak_bytes=base + higher)
    assert abs(fitter.between(fits, lower, over, higher, number) - (target - base)) <= 1


def test_the_search_keeps_what_fits():
    """Half of what is kept counts for the peak, so that the first guesses are too large and the next too small."""
    fitter = object.__new__(_Fitter)
    fitter.target, fitter.limit = 1000, 1010

    def trial(keep_bytes, move_bytes, exactly=False):
        return SimpleNamespace(kept_bytes=keep_bytes, move_bytes=move_bytes, peak_bytes=100 + keep_bytes // 2)

    fitter.trial = trial
    found = fitter.keeping_most(trial(5000, 0))
    assert 950 <= found.peak_bytes <= fitter.limit


# --- release -------------------------------------------------------------------------------------------------------


@cache
def bucketed(name: str) -> Graph:
    recipe = "canonicalize,partition(stage=3),bucket(max_bytes=4000,pack_below_bytes=4000),broadcast,all-gather,"
    return parse_recipe(recipe + "reduce-scatter,all-reduce,host-copies").run(captured(name), TWO)


def check_released(before: Graph, after: Graph) -> int:
    """Number of values that are gathered: each is released once, behind its last reader, unless it is returned."""
    memory, found = Memory(before), 0
    released = [v.name for n in of_op(after, "release") for v in n.operands]
    assert len(released) == len(set(released))
    at = {v.name: p for p, n in enumerate(after.nodes) if n.op == "release" for v in n.operands}
    gathered = {n.results[0].name for n in of_op(before, "all_gather_start")}
    flat = {w.results[0].name for w in of_op(before, "wait") if w.operands[0].name in gathered}
    parts = {r.name for n in of_op(before, "unpack") if n.operands[0].name in flat for r in n.results}
    for name in flat | parts:
        if memory.roots(name) & memory.returned():
            assert name not in at
            continue
        found += 1
        readers = [
            p
            for p, n in enumerate(after.nodes)
            if n.op != "release" and any(memory.roots(v.name) & memory.roots(name) for v in n.operands)
        ]
        assert at[name] > max(readers, default=-1), f"{name} is still read"
        assert all(n.op == "release" for n in after.nodes[max(readers) + 1 : at[name]]), f"{name} is kept for nothing"
    return found


@pytest.mark.parametrize("name", ["llama", "tied", "convnet"])
def test_what_was_gathered_and_unpacked_is_released(name):
    before = bucketed(name)
    assert of_op(before, "unpack")
    after = Release().run(before, TWO)
    assert check_released(before, after) > sum(len(n.operands) for n in of_op(before, "unpack"))


@settings(max_examples=40, deadline=None)
@given(graph=graphs())
def test_random_graphs_release_all_that_they_gathered(graph):
    recipe = "canonicalize,partition(stage=3),bucket(max_bytes=200),broadcast,all-gather,reduce-scatter,all-reduce"
    before = parse_recipe(recipe + ",host-copies").run(graph, TWO)
    check_released(before, Release().run(before, TWO))


RELEASED = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %a: f32[64]<S0> "a" stage=3
input %x: f32[64]<V>
fwd %a_start: future f32[64]<R> = all_gather_start(%a)
fwd %af: f32[64]<R> = wait(%a_start)
fwd %y: f32[64]<V> = aten.mul.Tensor(%x, %af)
fwd %z: f32[64]<V> = aten.mul.Tensor(%y, %y)
fwd %unused: f32[64]<V> = aten.mul.Tensor(%x, {read})
fwd release(%af)
return fwd output %z
"""


@pytest.mark.parametrize(("read", "behind"), [("%x", "z"), ("%af", "y")])
def test_a_release_stays_unless_what_read_the_memory_last_is_gone(read, behind):
    graph = parse_graph(RELEASED.replace("{read}", read))
    verify(graph)
    after = DeadCode().run(graph, TWO)
    verify(after)
    at = next(p for p, n in enumerate(after.nodes) if n.op == "release")
    assert after.nodes[at - 1].name == behind
    assert len(after.nodes) == len(graph.nodes) - 1


# --- fusion --------------------------------------------------------------------------------------------------------

DROPOUT = """graph "g"
op aten.mul.Tensor
op aten.native_dropout.default random multi
op aten.native_dropout_backward.default
input %x: f32[64, 16]
input %r: f32[64, 16]
tangent %t: f32[64, 16]
fwd %d: f32[64, 16], %mask: bool[64, 16] = aten.native_dropout.default(%x, {p}, true)
fwd %y: f32[64, 16] = aten.mul.Tensor(%d, %r)
bwd %dy: f32[64, 16] = aten.mul.Tensor(%t, %r)
bwd %dx: f32[64, 16] = aten.native_dropout_backward.default(%dy, %mask, {scale})
return fwd output %y
return bwd grad "x" %dx
return bwd output none
"""


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.75])
def test_a_fused_dropout_keeps_the_mean(p):
    """Elements that are kept are divided by the probability that it is, in the forward and in the backward."""
    text = DROPOUT.replace("{p}", str(p)).replace("{scale}", str(1 / (1 - p)))
    fused = parse_recipe("canonicalize,fuse").run(parse_graph(text), Context())
    kernels = of_op(fused, ROWS)
    assert [k.phase for k in kernels] == [Phase.forward, Phase.backward]
    kept = []
    for kernel in kernels:
        spec = KernelSpec.parse(str(kernel.args[-1]))
        ones = torch.ones(64, 16, dtype=torch.float64)
        inputs = [torch.tensor(7) if o.dtype.value == "i64" else ones for o in spec.inputs]
        made = reference.run(spec, inputs, 64, torch.float64)[-1]
        assert made.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
        assert made.mean().item() == pytest.approx(1.0, abs=0.2)
        kept.append(made > 0)
    assert torch.equal(*kept)


def test_a_dropout_that_keeps_nothing_makes_zeros():
    text = DROPOUT.replace("{p}", "1.0").replace("{scale}", "0.0")
    fused = parse_recipe("canonicalize,fuse").run(parse_graph(text), Context())
    kernels = of_op(fused, ROWS)
    assert [k.phase for k in kernels] == [Phase.forward, Phase.backward]
    for kernel in kernels:
        spec = KernelSpec.parse(str(kernel.args[-1]))
        inputs = [torch.tensor(7) if o.dtype is DType.i64 else torch.ones(64, 16).double() for o in spec.inputs]
        assert reference.run(spec, inputs, 64, torch.float64)[-1].count_nonzero() == 0


MERGED = """graph "g"
op aten.add.Tensor
op aten.exp.default
op aten.mul.Tensor
input %x: f32[64, 16]
input %u: f32[64, 16]
fwd %a: f32[64, 16] = aten.exp.default(%x)
fwd %b: f32[64, 16] = aten.exp.default(%u)
fwd %c: f32[64, 16] = aten.mul.Tensor(%b, 3.0)
fwd %y: f32[64, 16] = aten.add.Tensor(%a, %c)
return fwd output %y
"""


TWICE = """graph "g"
op aten._to_copy.default
op aten.exp.default
input %x: f32[64, 16]
fwd %a: f32[64, 16] = aten.exp.default(%x)
fwd %b: bf16[64, 16] = aten._to_copy.default(%a, dtype=bf16)
return fwd output %a
return fwd output %b
"""


@pytest.mark.parametrize(
    "graph", [parse_graph(MERGED), parse_graph(TWICE), "llama", "bf16"], ids=["merged", "twice", "llama", "bf16"]
)
def test_fused_graphs_give_the_numbers_that_they_gave(graph):
    given = captured(graph) if isinstance(graph, str) else graph
    fused = parse_recipe("canonicalize,fuse").run(given, Context())
    verify(fused)
    assert of_op(fused, ROWS)
    reference = Reference(given, 1)
    for wanted, got in zip(reference.run(given), reference.run(fused), strict=True):
        assert (wanted is None) == (got is None)
        for a, b in zip(wanted or (), got or (), strict=True):
            tolerance = 1e-5 if a.dtype is torch.float32 else 5e-2
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


class Classifier(torch.nn.Linear):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(super().forward(x), target)


def test_the_loss_of_a_projection_is_fused_with_it():
    model = Classifier(8, 16, bias=False)
    graph = zgraph.trace(model, torch.ones(4, 8, requires_grad=True), torch.zeros(4, dtype=torch.int64))
    ops = {n.op for n in parse_recipe("canonicalize,fuse,dce").run(graph, Context()).nodes}
    assert {PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD} <= ops
    assert not ops & {LOSS, LOSS_BACKWARD, "aten.mm.default"}


@pytest.mark.parametrize(
    ("weight", "strides", "wanted"),
    [
        ("aten.t.default(%w)", "", PROJECTED_LOSS),
        ("aten.exp.default(%w)", "", LOSS),
        ("", "", LOSS),
        ("aten.t.default(%w)", " | 1, 8", LOSS),
    ],
    ids=["of a linear layer", "of a matrix that is computed", "of an input", "of rows that are not contiguous"],
)
def test_a_projection_is_a_linear_layer(weight, strides, wanted):
    made = f"fwd %v: f32[8, 8{' | 1, 8' if '.t.' in weight else ''}] = {weight}\n" if weight else ""
    head = "op aten.mm.default\nop aten.t.default views(0)\nop aten.exp.default\nop aten.nll"
    graph = parse_graph(
        LOSS_TEXT.format(dim=1, strides="")
        .replace("op aten.nll", head)
        .replace("input %x: f32[8, 8]", f"input %h: f32[8, 8{strides}]\ninput %w: f32[8, 8]")
        .replace("fwd %p", f"{made}fwd %x: f32[8, 8] = aten.mm.default(%h, {'%v' if weight else '%w'})\nfwd %p")
    )
    verify(graph)
    fused = parse_recipe("fuse").run(graph, Context())
    verify(fused)
    assert [n.op for n in fused.nodes if n.op in (LOSS, PROJECTED_LOSS)] == [wanted]


@pytest.mark.parametrize(("made", "reads"), [("exp.default(%c)", "x"), ("_softmax.default(%c, 1, false)", "y")])
def test_a_kernel_of_the_backward_makes_again_what_needs_no_sum(made, reads):
    """Although the sum of a softmax would read fewer bytes, too."""
    fused = parse_recipe("fuse,dce").run(
        parse_graph(f"""graph "g"
op aten._softmax.default
op aten._to_copy.default
op aten.exp.default
op aten.mul.Tensor
input %x: bf16[64, 16]
tangent %t: f32[64, 16]
fwd %c: f32[64, 16] = aten._to_copy.default(%x, dtype=f32)
fwd %y: f32[64, 16] = aten.{made}
bwd %p: f32[64, 16] = aten.mul.Tensor(%t, %y)
bwd %q: f32[64, 16] = aten.mul.Tensor(%p, %y)
return fwd output %y
return bwd grad "x" none
return bwd output %q
"""),
        Context(),
    )
    _, backward = of_op(fused, ROWS)
    assert {v.name for v in backward.operands} == {"t", reads}


def test_what_lies_in_no_rows_is_not_fused():
    text = MERGED.replace("input %u: f32[64, 16]", "input %u: f32[64, 16 | 1, 64]").replace(
        "fwd %b: f32[64, 16] =", "fwd %b: f32[64, 16 | 1, 64] ="
    )
    graph = parse_graph(text.replace("fwd %c: f32[64, 16] =", "fwd %c: f32[64, 16 | 1, 64] ="))
    verify(graph)
    fused = parse_recipe("fuse").run(graph, Context())
    assert of_op(fused, "aten.add.Tensor")


LOSS_TEXT = """graph "g"
op aten._log_softmax.default
op aten.nll_loss_forward.default multi
input %x: f32[8, 8{strides}]
input %t: i64[8]
fwd %p: f32[8, 8{strides}] = aten._log_softmax.default(%x, {dim}, false)
fwd %l: f32[], %n: f32[] = aten.nll_loss_forward.default(%p, %t, none, 1, -100)
return fwd output %l
"""


@pytest.mark.parametrize(
    ("dim", "strides", "is_fused"), [(1, "", True), (-1, "", True), (0, "", False), (1, " | 1, 8", False)]
)
def test_a_loss_is_fused_where_the_softmax_is_over_rows(dim, strides, is_fused):
    graph = parse_graph(LOSS_TEXT.format(dim=dim, strides=strides))
    verify(graph)
    fused = parse_recipe("fuse").run(graph, Context())
    assert bool(of_op(fused, LOSS)) == is_fused
    assert bool(of_op(fused, "aten._log_softmax.default")) != is_fused


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Keep, ("num_ahead",)),
        (Recompute, ("keep_bytes",)),
        (Offload, ("num_bytes", "min_bytes")),
        (Schedule, ("num_ahead", "effort", "slack")),
    ],
)
def test_options_may_be_0_and_no_less(kind, options):
    for option in options:
        kind(**{option: 0})
        with pytest.raises(ValueError, match="must be 0 or more"):
            kind(**{option: -1})


def test_only_what_stays_where_it_is_on_ranks_is_a_copy():
    """A gather of shards on the host takes them from there, so that it is no copy."""
    text = TWO_LAYERS.replace('param %a: f32[64]<S0> "a" stage=3', 'param %a: f32[64]<S0>@host "a" stage=3')
    moved = ("fwd %z: f32", "fwd %y_host: f32[64]<V>@host = reshard(%y)\nfwd %z: f32")
    back = ("bwd %ty: f32", "bwd %y_back: f32[64]<V> = reshard(%y_host)\nbwd %ty: f32")
    graph = parse_graph(text.replace(*moved).replace(*back).replace("(%t, %y)", "(%t, %y_back)"))
    verify(graph)
    after = HostCopies().run(graph, TWO)
    verify(after)
    assert [n.name for n in of_op(after, "offload_start")] == ["y_host_start"]
    assert [n.name for n in of_op(after, "reload_start")] == ["y_back_start"]
    assert len(of_op(after, "reshard")) == len(of_op(graph, "reshard")) - 2 == 6


VIEWED = ("fwd %p", "fwd %v: f32[8, 8] = aten.view.default(%x, [8, 8])\nfwd %p")


def test_a_budget_of_the_peak_leaves_room_to_keep_what_is_gathered_elsewhere():
    """The peak is over before the layers begin; one byte less, and nothing can be kept."""
    early = "fwd %k: f32[4096]<V> = aten.mul.Tensor(%m, %m)\nfwd %l: f32[4096]<V> = aten.mul.Tensor(%k, %k)\nfwd %af:"
    text = TWO_LAYERS.replace("tangent %t", "input %m: f32[4096]<V>\ntangent %t").replace("fwd %af:", early)
    graph = parse_graph(text)
    peak = lowered(graph, TWO).plain[1].peak.total_bytes
    again = [gathers_again(Keep(0).run(graph, replace(TWO, memory_budget=peak + more))) for more in (-1, 0)]
    assert again == [2, 0]


@pytest.mark.parametrize("word", ["never", "auto", "always"])
def test_fuse_takes_three_words_for_matmuls(word):
    assert Fuse(matmuls=word).matmuls == word
    with pytest.raises(ValueError, match="never, auto or always"):
        Fuse(matmuls=f"{word}s")


@pytest.mark.parametrize(
    ("changes", "is_fused"),
    [
        ([], True),
        ([("return fwd output %l", "return fwd output %l\nreturn fwd output %p")], False),
        ([("return fwd output %l", "fwd %q: f32[8, 8] = aten.exp.default(%p)\nreturn fwd output %l")], False),
        ([("none, 1, -100", "none, 2, -100")], True),
        ([("none, 1, -100", "none, 0, -100")], False),
        ([("none, 1, -100", "%w, 1, -100"), ("fwd %p", "fwd %w: f32[8] = aten.exp.default(%x)\nfwd %p")], False),
        ([("%x: f32[8, 8]", "%x: f32[64]"), ("_softmax.default(%x", "_softmax.default(%v"), VIEWED], False),
        ([("%x: f32[8, 8]", "%x: f32[2, 4, 8]"), ("_softmax.default(%x", "_softmax.default(%v"), VIEWED], True),
    ],
    ids=["mean", "returned", "read", "sum", "one a token", "weights", "of no rows", "of a view"],
)
def test_a_loss_is_fused_where_nothing_else_needs_what_is_inside(changes, is_fused):
    text = LOSS_TEXT.format(dim=1, strides="").replace(
        "op aten.nll", "op aten.exp.default\nop aten.view.default views(0)\nop aten.nll"
    )
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    graph = parse_graph(text)
    verify(graph)
    fused = parse_recipe("fuse").run(graph, Context())
    verify(fused)
    assert bool(of_op(fused, LOSS)) == is_fused
    for made in of_op(fused, LOSS):
        assert made.args[-2:] == (-100, "none, 1" in text)


def test_a_loss_in_half_precision_is_computed_in_single():
    """Its results are cast back, each of the two from its own."""
    fused = parse_recipe("fuse").run(parse_graph(LOSS_TEXT.format(dim=1, strides="").replace("f32", "bf16")), Context())
    verify(fused)
    (made,) = of_op(fused, LOSS)
    assert [r.tensor.dtype for r in made.results] == [DType.f32] * 3
    casts = {n.name: n.operands[0] for n in of_op(fused, "aten._to_copy.default")}
    assert casts.get("l") == made.results[0]
    assert casts.get("n", made.results[1]) == made.results[1]


# --- the fastest way to run a group --------------------------------------------------------------------------------


def best(
    measured: dict[str, float], matmuls: str = "auto", rate: float = 0.75, ways: str = "aten kernel inductor"
) -> str:
    """Which way is taken, where each is so many ops of the same size."""
    graph = parse_graph(MERGED)
    counts = {"aten": 1, "inductor": 1, "matmul": 2, "kernel": 3, "library": 4}
    nodes = {way: graph.nodes[:1] * counts[way] for way in ways.split()}
    machine = hardware("h100")
    device = machine.device.model_copy(update={"generated_matmul_rate": rate})
    costs = CostTable(hardware=machine.model_copy(update={"device": device}), per_host=1, groups={"key": measured})
    return Candidates(None, "key", None, nodes, graph).best(Context(costs=costs), matmuls)


RECTIFIED_ROWS = """graph "g"
op aten.addmm.default
op aten.relu.default
op aten.view.default views(0)
param %w: f32[8, 16] "w"
param %b: f32[16] "b"
input %x: f32[8, 8]
fwd %z: f32[8, 16] = aten.addmm.default(%b, %x, %w)
fwd %v: f32[2, 4, 16] = aten.view.default(%z, [2, 4, 16])
fwd %y: f32[2, 4, 16] = aten.relu.default(%v)
return fwd output %y
"""


def test_the_librarys_epilogue_serves_rows_in_more_dimensions():
    (found,) = fuse_candidates(parse_graph(RECTIFIED_ROWS), Context())
    call, view = found.nodes["library"]
    assert [r.tensor.shape for n in (call, view) for r in n.results] == [(8, 16), (2, 4, 16)]


@pytest.mark.parametrize(
    ("before", "after", "is_taken"),
    [
        ("", "", True),
        ("%b: f32[16] ", "%b: f32[16 | 2] ", False),
        ("%b: f32[16] ", "%b: f32[1, 16] ", True),
        ("2, 4, 16", "8, 4, 4", False),
    ],
    ids=["a bias", "a bias with gaps", "a row", "other rows"],
)
def test_a_matmul_is_in_the_kernel_of_what_follows_where_its_bias_and_its_result_lie_in_the_kernels_rows(
    before, after, is_taken
):
    graph = parse_graph(RECTIFIED_ROWS.replace(before, after) if before else RECTIFIED_ROWS)
    verify(graph)
    taken = [name for found in fuse_candidates(graph, Context()) for name in found.nodes]
    assert ("matmul" in taken) == is_taken


ABSENT = """graph "g"
op aten.expand.default views(0)
op aten.add.Tensor
op aten.mul.Tensor
op aten.sum.default
op aten.tanh.default
input %x: f32[64, 16]
tangent %t: f32[]
tangent %u: f32[64, 16]
fwd %h: f32[64, 16] = aten.tanh.default(%x)
fwd %loss: f32[] = aten.sum.default(%h)
bwd %e: f32[64, 16 | 0, 0] = aten.expand.default(%t, [64, 16])
bwd %d: f32[64, 16] = aten.mul.Tensor(%e, %x)
bwd %s: f32[64, 16] = aten.add.Tensor(%d, %u)
bwd %g: f32[64, 16] = aten.mul.Tensor(%s, %h)
return fwd output %loss
return fwd output %h
return bwd grad "x" %g
"""


@pytest.mark.parametrize("read", ["e", "h"], ids=["alone", "behind what can be fused"])
def test_what_reads_a_tangent_that_is_likely_to_be_zero_is_in_no_kernel(read):
    graph = parse_graph(ABSENT.replace("(%e, %x)", f"(%{read}, %x)"))
    verify(graph)
    fused = parse_recipe("fuse,dce").run(graph, Context())
    left = without_tangents(fused, zero_tangents(fused))
    assert left is not None
    assert not any(v.name == "u" for n in left.nodes for v in n.operands)


def test_what_is_weighed_writes_what_is_read_and_no_more():
    """Of the products only the first is read by others than its epilogue."""
    graph = parse_graph(Golden.read(FOLDER / "fuse-matmul.zir").before)
    calls = [c.nodes["matmul"] for c in fuse_candidates(graph, Context()) if "matmul" in c.nodes]
    made = [[r.name.partition("_")[0] for n in call if n.op == MATMUL for r in n.results] for call in calls]
    assert made == [["h", "a"], ["y"], ["dh", "db"]]


ALONE = """graph "g" mesh(shard=1)
op aten.relu.default
input %x: f32[4,8]<V>
fwd %y: f32[4,8]<V> = aten.relu.default(%x)
return fwd output %y
"""


def test_an_op_alone_is_no_kernel():
    assert [list(found.nodes) for found in fuse_candidates(parse_graph(ALONE), Context())] == [["aten"]]


def test_what_was_measured_decides():
    assert best({"aten": 2.0, "kernel": 3.0, "inductor": 1.0}) == "inductor"
    assert best({"aten": 2.0, "kernel": 3.0, "inductor": 4.0, "matmul": 1.0}) == "aten"


def test_what_was_not_measured_altogether_is_estimated():
    """A kernel counts as faster than its ops, and Inductor's is never taken."""
    assert best({"aten": 2.0, "kernel": 3.0}) == "kernel"
    assert best({}, ways="aten inductor") == "aten"
    everything = "aten kernel inductor matmul library"
    assert best({}, ways=everything) == "matmul"
    assert best({}, rate=0.0, ways=everything) == "kernel"
    assert best({}, matmuls="always", rate=0.0, ways=everything) == "matmul"
    assert best({}, matmuls="always") == "kernel"


@pytest.mark.parametrize(("peak", "moves"), [(99, 0), (100, 0), (101, 50)])
def test_nothing_is_moved_where_the_limit_is_just_met(peak, moves):
    fitter = object.__new__(_Fitter)
    fitter.limit, fitter.target = 100, 100
    most = SimpleNamespace(keep_bytes=None, move_bytes=50, peak_bytes=100)
    fitter.trial = lambda keep_bytes, move_bytes: SimpleNamespace(keep_bytes=None, move_bytes=0, peak_bytes=peak)
    assert fitter.moving_least(most).move_bytes == moves
