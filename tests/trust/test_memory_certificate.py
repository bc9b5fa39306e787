"""The peak that is recomputed from a graph is the plan's, and what is over the budget is refused."""

import io
import json
import sys
import time
import zipfile
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zgraph
from benchmarks.prefetch import Prefetch
from tests.cost.test_memory import BY_HAND, deep
from tests.ir.strategies import graphs
from tests.small import llama
from zgraph.certify.budget import Limit, footprint, over, rest_bytes
from zgraph.certify.certificate import certify
from zgraph.certify.memory import peak
from zgraph.cli.main import main
from zgraph.errors import BudgetError, VerifyError
from zgraph.estimate.trace import traced
from zgraph.ir import Axis, Graph, InputKind, Phase, parse_graph, verify
from zgraph.ir.arena import ALIGN_BYTES, offsets, sized
from zgraph.passes import RECIPES, Context, parse_recipe
from zgraph.passes.plan.make_plan import memory_of
from zgraph.runfile.format import MANIFEST, Provenance, Recording, load_run

PAIR = (Axis("shard", 2),)
MESHES = {"1": (), "2": PAIR, "3": (Axis("shard", 3),), "2x2": (Axis("replicate", 2), Axis("shard", 2))}


def claimed(graph: Graph) -> int:
    """The peak that zgraph's own plan has."""
    return memory_of(graph, {}).peak.total_bytes


def recomputed(graph: Graph) -> int:
    return peak(graph, {}, released=True).num_bytes


@cache
def captured() -> Graph:
    """A Llama of two layers."""
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    return zgraph.trace(llama(32, 2, 64, num_heads=2, num_kv_heads=1, inner=64), input_ids=tokens, labels=tokens)


@cache
def made(stage: int, mesh: tuple[Axis, ...] = PAIR, **options: object) -> Graph:
    """A Llama after a stage's passes."""
    return parse_recipe(RECIPES[stage]).run(captured(), Context(mesh=mesh, **options))


@cache
def smallest(stage: int, **options: object) -> int:
    """The smallest budget there is."""
    try:
        made(stage, memory_budget=1, **options)
    except BudgetError as error:
        return int(str(error).split(" is the smallest that can")[0].split()[-1].replace(",", ""))
    raise AssertionError


# --- the plan's peak ---------------------------------------------------------------------------------------------


def test_the_peak_is_the_one_worked_out_by_hand():
    found = peak(parse_graph(BY_HAND), {})
    assert (found.num_bytes, found.node, found.phase) == (448, "h", "bwd")
    assert found.largest == (("h", 256), ("g", 128), ("rs", 64))


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "options",
    [{}, {"groups_calls": True}, {"keeps_blocks": True}, {"groups_calls": True, "keeps_blocks": True}],
    ids=str,
)
def test_it_is_the_plans(stage, mesh, options):
    graph = made(stage, MESHES[mesh], **options)
    assert bool(graph.arenas) >= ("keeps_blocks" in options and stage == 3 and mesh != "1")
    assert recomputed(graph) == claimed(graph)


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("offloads", ["never", "auto", "always"])
@pytest.mark.parametrize("recomputes", ["never", "auto", "always"])
def test_it_is_the_plans_in_a_budget(stage, offloads, recomputes):
    options = {"offloads": offloads, "recomputes": recomputes, "keeps_blocks": True}
    for budget in {smallest(stage, **options), 3 * claimed(made(stage)) // 4}:
        try:
            graph = made(stage, memory_budget=budget, **options)
        except BudgetError:
            continue
        assert recomputed(graph) == claimed(graph) <= budget


@pytest.mark.parametrize("stage", RECIPES)
def test_it_is_the_plans_with_recompute_and_offload(stage):
    again = made(stage, memory_budget=smallest(stage))
    assert sum("recompute" in n.origin.made_by for n in again.nodes) > 0
    recipe = RECIPES[stage].replace("fit,", "recompute(keep_bytes=8KiB),offload(num_bytes=1GiB, min_bytes=1),")
    moved = parse_recipe(recipe).run(captured(), Context(mesh=PAIR, keeps_blocks=True))
    assert sum(n.op == "offload_start" for n in moved.nodes) > 0
    for graph in (again, moved):
        assert recomputed(graph) == claimed(graph)


@settings(max_examples=150, deadline=None)
@given(
    graphs(),
    st.sampled_from(list(RECIPES.values())),
    st.sampled_from(list(MESHES.values())),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["never", "auto", "always"]),
    st.sampled_from(["never", "auto", "always"]),
    st.none() | st.integers(64, 4096),
)
def test_it_is_the_plans_for_random_graphs(graph, recipe, mesh, grouped, blocks, recomputes, offloads, budget):
    context = Context(
        mesh=mesh,
        groups_calls=grouped,
        keeps_blocks=blocks,
        recomputes=recomputes,
        offloads=offloads,
        memory_budget=budget,
    )
    try:
        found = parse_recipe(recipe).run(graph, context)
    except BudgetError:
        return
    assert recomputed(found) == claimed(found)
    assert budget is None or recomputed(found) <= budget


def test_what_lies_at_rest_is_each_ranks_part():
    graph = made(3)
    inputs = [i for i in graph.inputs if i.kind in (InputKind.param, InputKind.buffer, InputKind.constant)]
    whole = sum(i.value.tensor.numel * i.value.tensor.dtype.itemsize for i in inputs)
    assert whole // 2 <= rest_bytes(graph, {}) <= whole // 2 + 64 * len(inputs)
    assert whole <= rest_bytes(made(0), {}) <= whole + 64 * len(inputs)


def test_it_takes_a_second_for_27_000_nodes():
    recipe = f"partition(stage=3),all-gather,reduce-scatter,all-reduce,release,{Prefetch.name}(depth=2)"
    graph = parse_recipe(recipe).run(deep(2080), Context(mesh=(Axis("shard", 4),)))
    assert len(graph.nodes) > 27_000
    began = time.process_time()
    found = peak(graph, {}, released=True)
    assert time.process_time() - began < 6, "a second or two where nothing else runs"
    assert found.num_bytes > 1 << 20


# --- what is over the budget -------------------------------------------------------------------------------------


def faults(graph: Graph, budget: int, stated: int | None = None) -> list[tuple[int | None, str]]:
    """Faults of a graph whose budget above rest this is."""
    verify(graph)
    highest, limit = peak(graph, {}, released=True), Limit(budget + rest_bytes(graph, {}), stated=stated)
    return list(over(graph, highest, footprint(graph, highest, limit, {}), limit))


def dropped_releases(graph: Graph) -> Graph:
    return graph.with_nodes([n for n in graph.nodes if n.op != "release" or n.phase is not Phase.forward])


def late_releases(graph: Graph) -> Graph:
    late = [n for n in graph.nodes if n.op == "release" and n.phase is Phase.forward]
    nodes = [n for n in graph.nodes if n not in late]
    at = sum(n.phase is Phase.forward for n in nodes)
    return graph.with_nodes([*nodes[:at], *late, *nodes[at:]])


def blown_up(graph: Graph) -> Graph:
    """The last buffer of the arena 10 MB away."""
    position = max(p for p, n in enumerate(graph.nodes) if offsets(n) and n.phase is Phase.forward)
    node = graph.nodes[position]
    at = tuple(offset + 20_000 * ALIGN_BYTES for offset in offsets(node))
    moved = replace(node, kwargs=tuple((k, at if k == "at" else v) for k, v in node.kwargs))
    return sized(graph.with_nodes([*graph.nodes[:position], moved, *graph.nodes[position + 1 :]]))


@pytest.mark.parametrize("change", [dropped_releases, late_releases])
def test_releases_that_are_missing_or_late(change):
    graph = made(3)
    budget = recomputed(graph)
    assert faults(graph, budget) == []
    ((position, message),) = faults(change(graph), budget)
    assert position is not None
    assert "is the peak of the step: " in message
    assert f"and the budget is {budget + rest_bytes(graph, {}):,} bytes; the largest are %" in message


def test_more_kept_than_there_is_room_for():
    roomy = made(3, memory_budget=1 << 40)
    assert faults(roomy, 1 << 40) == []
    ((_, message),) = faults(roomy, smallest(3))
    assert "is the peak of the step" in message


def test_an_arena_that_is_blown_up():
    graph = made(3, keeps_blocks=True)
    budget = recomputed(graph)
    first, second = faults(blown_up(graph), budget)
    assert "%arena fwd 10," in first[1]
    assert "but all that lies in it takes" in second[1]
    assert [m for _, m in faults(blown_up(graph), 1 << 40)] == [second[1]], "without a budget as well"


def test_more_than_the_run_states():
    graph = made(2)
    assert faults(graph, 1 << 40, claimed(graph)) == []
    ((_, message),) = faults(graph, 1 << 40, claimed(graph) - 1)
    assert f"but the run states a peak of {claimed(graph) - 1:,}: %" in message


def test_the_optimizers_step_is_within_the_budget():
    graph = made(1)
    highest, rest = peak(graph, {}, released=True), rest_bytes(graph, {})
    update = highest.num_bytes + 64
    for spare, wanted in ((0, 0), (-1, 1)):
        limit = Limit(rest + update + spare, 0, update)
        found = list(over(graph, highest, footprint(graph, highest, limit, {}), limit))
        assert len(found) == wanted
    assert found[0][1].startswith(f"the optimizer's step takes {update:,} bytes above {rest:,} at rest")


# --- certificates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", RECIPES)
def test_the_certificate_has_the_footprint(stage):
    context = Context(mesh=PAIR, rest_bytes=1 << 20, memory_budget=1 << 30, update_bytes=64)
    recording = Recording(captured())
    parse_recipe(RECIPES[stage]).run(recording.captured, context, [recording])
    steps = [("captured", recording.captured), *((step.partition("(")[0], g) for step, g, _ in recording.steps)]
    found = certify(steps, context).footprint
    assert found is not None
    assert found.peak_bytes == claimed(recording.steps[-1][1])
    assert (found.rest_bytes, found.update_bytes, found.budget) == (1 << 20, 64, 1 << 30)
    assert f"{(1 << 20) + found.peak_bytes:,} bytes of the device at most" in str(found)
    assert certify(steps[:3], replace(context, memory_budget=1)).footprint is None, (
        "its reshards are not yet carried out"
    )
    with pytest.raises(VerifyError, match=r"\[budget\] %\S+ is the peak of the step"):
        certify(steps, replace(context, memory_budget=(1 << 20) + found.peak_bytes - 1))


def edited(run: bytes, member: str, change) -> bytes:
    """A run file with a member of it as JSON changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(run)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == member:
                data = json.dumps(change(json.loads(data))).encode()
            new.writestr(name, data)
    return stream.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run file, as bytes."""
    path = tmp_path_factory.mktemp("run") / "run.zg"
    context = Context(mesh=PAIR, memory_budget=1 << 30)
    recording = Recording(captured())
    parse_recipe(RECIPES[3]).run(recording.captured, context, [recording])
    recording.run_file(Provenance(model="Llama"), context).save(path)
    return path.read_bytes()


def verified(capsys, path, *options: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["zgraph", "verify", str(path), *options])
        with pytest.raises(SystemExit) as ended:
            main()
    printed = capsys.readouterr()
    return int(ended.value.code), printed.out, printed.err


def test_verify_prints_the_peak_and_the_budget(run, tmp_path, capsys):
    (tmp_path / "run.zg").write_bytes(run)
    found = load_run(tmp_path / "run.zg")
    size = found.stated.memory.peak.total_bytes
    code, printed, _ = verified(capsys, tmp_path / "run.zg")
    assert code == 0
    assert f"{size:,} at the peak (%" in printed
    assert "budget 1,073,741,824" in printed
    _, printed, _ = verified(capsys, tmp_path / "run.zg", "--json")
    assert json.loads(printed)["memory"]["peak_bytes"] == size


def test_verify_refuses_what_is_over_the_budget(run, tmp_path, capsys):
    def change(manifest):
        manifest["context"]["memory_budget"] = 50_000
        return manifest

    (tmp_path / "run.zg").write_bytes(edited(run, MANIFEST, change))
    code, _, said = verified(capsys, tmp_path / "run.zg")
    assert code == 1
    said = " ".join(said.split())
    assert "[budget] %" in said
    assert "the budget is 50,000 bytes; the largest are %" in said


def test_verify_refuses_a_peak_that_is_not_the_graphs(run, tmp_path, capsys):
    def change(predicted):
        for moment in predicted["timeline"]["moments"]:
            moment[2] = {"gathered": 64}
        return predicted

    (tmp_path / "run.zg").write_bytes(edited(run, "timeline.json", change))
    code, _, said = verified(capsys, tmp_path / "run.zg")
    assert code == 1
    assert "the run states a peak of 64" in " ".join(said.split())


def test_a_recipe_that_does_not_look_at_the_budget_cannot_break_it():
    model = zgraph.compile(
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)),
        passes="canonicalize,partition(stage=0)",
        memory_budget=52_000,
    )
    with pytest.raises(VerifyError, match=r"\[budget\]"):
        model(torch.ones(64, 64)).sum().backward()


def test_what_is_traced_counts_the_optimizers_step():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
    model[0].requires_grad_(False)
    options = {"hardware": "8x8-h100", "num_ranks": 2}
    inputs = {"input": torch.ones(4, 64, device="meta")}
    context = traced(model, inputs, parse_recipe(RECIPES[3]), **options).context
    assert context.rest_bytes == 3 * 2 * 64 * 64 * 4 // 2
    assert context.update_bytes == 2 * 64 * 64 * 4 // 2
    certificate = traced(model, inputs, parse_recipe(RECIPES[3]), **options).certificate
    assert certificate is not None
    assert certificate.footprint is not None
    assert certificate.footprint.update_bytes == context.update_bytes
    with pytest.raises(BudgetError):
        traced(model, inputs, parse_recipe(RECIPES[3]), memory_budget=context.rest_bytes + 1, **options)
