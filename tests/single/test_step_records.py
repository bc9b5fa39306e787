"""Records of training, profiles fitted to them, and how far a prediction was off."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

import zgraph
from small import llama
from zgraph.bridge.target import cost_table
from zgraph.compiler.step_recorder import EXPOSED_US, transfers_us
from zgraph.cost import CostTable, Hardware, Timeline, hardware, simulate
from zgraph.errors import RecordError, UsageError
from zgraph.estimate.comparison import WAITS, compare
from zgraph.estimate.trace import traced
from zgraph.ir import OPS, Instruction
from zgraph.passes import RECIPES, parse_recipe
from zgraph.passes.plan.make_plan import make_plan
from zgraph.runfile.format import RunFile
from zgraph.runfile.records import RUN, RankRecord, rank_files, read_record, save_rank

from .nets import Mlp, built, rows

SLOW = "1x2-a10"


@cache
def a_run(layers: int = 2, target: str = SLOW) -> RunFile:
    """A run of a small Llama, planned for this hardware at stage 3, with collectives of many sizes."""
    recipe = parse_recipe(RECIPES[3].replace("bucket", "bucket(max_bytes=32KiB)"))
    ids = torch.zeros(2, 64, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids}
    return traced(llama(64, layers), inputs, recipe, hardware=cost_table(target, torch.device("cpu")))


def costs_of(run: RunFile, truth: Hardware) -> CostTable:
    return run.context.costs.model_copy(update={"hardware": truth})


def step_of(run: RunFile, truth: Hardware) -> Timeline:
    return simulate(make_plan(run.graph(), only_step=True), costs_of(run, truth), run.context.hints)


def recorded(folder: Path, run: RunFile, truth: Hardware, *, scale: float = 1.0, apart: float = 1.0) -> Path:
    """The folder of a training on hardware of which everything is known: all that is recorded is as it says.

    scale: times as long as it says everything takes. apart: times as long nodes take in steps that are taken apart.
    """
    folder.mkdir(parents=True)
    run.save(folder / RUN)
    timeline = step_of(run, truth)
    costs = costs_of(run, truth)
    nodes = {s.node: apart * scale * (s.end_us - s.start_us) for s in timeline.spans if s.lane == "compute"}
    transfers = {
        n.name: scale * costs.transfer_us(run.graph(), n, {})
        for n in run.graph().nodes
        if n.op in OPS and OPS[n.op].lane == "comm"
    }
    for rank in range(2):
        save_rank(RankRecord(rank=rank, num_steps=2, nodes=nodes, transfers=transfers), folder)
        steps = [scale * timeline.step_us * factor for factor in (0.99, 1.0, 1.0, 1.0, 1.01)]
        rank_files(folder, rank)[1].write_text("".join(f"{us:.3f}\n" for us in steps))
    return folder


def another(base: str = SLOW) -> Hardware:
    """Hardware whose constants are others than those that were planned with."""
    found = hardware(base)
    device = found.device.model_copy(
        update={
            "matmul_flops": {dtype: rate / 3 for dtype, rate in found.device.matmul_flops.items()},
            "memory_bytes_per_s": found.device.memory_bytes_per_s / 2,
            "launch_us": 9.0,
        }
    )
    links = {"within": found.within.model_copy(update={"bytes_per_s": found.within.bytes_per_s / 5, "latency_us": 30})}
    return found.model_copy(update={"device": device, "overlap_slowdown": 1.0, **links})


def test_constants_are_found_again(tmp_path):
    truth = another()
    folder = recorded(tmp_path / "costs", a_run(), truth)
    found = zgraph.calibrate(folder, path=tmp_path / "mine.toml")
    mine = hardware(str(tmp_path / "mine.toml"))
    assert mine == found.hardware
    assert mine.name == "mine"
    assert mine.device.launch_us == pytest.approx(truth.device.launch_us, rel=0.02)
    assert mine.within.latency_us == pytest.approx(truth.within.latency_us, rel=0.02)
    assert mine.within.bytes_per_s == pytest.approx(truth.within.bytes_per_s, rel=0.02)
    assert step_of(a_run(), mine).step_us == pytest.approx(step_of(a_run(), truth).step_us, rel=0.01)
    assert found.residual < 0.01
    assert abs(found.runs[0].measured_us / found.runs[0].after_us - 1) < 0.01
    assert abs(found.runs[0].measured_us / found.runs[0].before_us - 1) > 0.3
    assert "one run" in mine.error.source
    assert mine.error.time_low == pytest.approx(0.8)


@pytest.mark.parametrize("apart", [0.6, 2.0])
def test_whole_steps_come_out_where_nodes_took_longer_one_by_one(tmp_path, apart):
    """Computing is leveled by whole steps; the links, which are timed as they are, stay."""
    truth = another()
    mine = zgraph.calibrate(recorded(tmp_path / "costs", a_run(), truth, apart=apart)).hardware
    assert step_of(a_run(), mine).step_us == pytest.approx(step_of(a_run(), truth).step_us, rel=0.01)
    assert mine.device.launch_us == pytest.approx(truth.device.launch_us, rel=0.05)
    assert mine.within.bytes_per_s == pytest.approx(truth.within.bytes_per_s, rel=0.02)


def test_steps_that_wait_for_their_links_say_nothing_of_computing(tmp_path):
    slow = another()
    link = slow.within.model_copy(update={"bytes_per_s": slow.within.bytes_per_s / 1000})
    truth = slow.model_copy(update={"within": link})
    mine = zgraph.calibrate(recorded(tmp_path / "costs", a_run(), truth)).hardware
    assert mine.device.launch_us == pytest.approx(truth.device.launch_us, rel=0.05)


def test_another_model_is_predicted(tmp_path):
    """Rates of matmuls and of memory, too: where they decide, and not the launches."""
    truth = another("cpu").model_copy(update={"name": "truth"})
    runs = [a_run(layers, "1x2-cpu") for layers in (1, 2, 3)]
    folders = [recorded(tmp_path / str(at), run, truth) for at, run in enumerate(runs[:2])]
    mine = zgraph.calibrate(*folders).hardware
    assert step_of(runs[2], mine).step_us == pytest.approx(step_of(runs[2], truth).step_us, rel=0.01)
    assert mine.device.rate("f32") == pytest.approx(truth.device.rate("f32"), rel=0.05)
    assert mine.device.memory_bytes_per_s == pytest.approx(truth.device.memory_bytes_per_s, rel=0.05)


def test_error_bars_come_from_runs_that_were_left_out(tmp_path):
    """Of two runs, one is of a machine that was busy: each is predicted by the other's constants."""
    folders = [recorded(tmp_path / str(s), a_run(), another(), scale=s) for s in (1.0, 1.5)]
    mine = zgraph.calibrate(*folders).hardware
    assert mine.error.time_low == pytest.approx(0.99 / 1.5, rel=0.02)
    assert mine.error.time_high == pytest.approx(1.01 * 1.5, rel=0.02)
    assert "left" in mine.error.source or "without it" in mine.error.source


def test_what_is_off_is_blamed(tmp_path):
    folder = recorded(tmp_path / "costs", a_run(), hardware(SLOW))
    record = json.loads(rank_files(folder, 0)[0].read_text())
    of_op = {n.name: n.op for n in a_run().graph().nodes}
    slow = next(name for name in record["nodes"] if of_op[name] == "aten.mm.default")
    for rank in range(2):
        record["rank"] = rank
        record["nodes"][slow] += 1000.0
        rank_files(folder, rank)[0].write_text(json.dumps(record))
        record["nodes"][slow] -= 1000.0
    found = compare(read_record(folder / RUN))
    assert found.ops[0].op == "aten.mm.default"
    assert found.ops[0].off_us == pytest.approx(1000)
    assert all(abs(row.off_us) < 1e-6 for row in found.ops[1:] if row.op != WAITS)
    assert found.is_within
    assert abs(found.off) < 0.001
    assert "aten.mm.default" in str(found)
    assert "within the predicted interval" in str(found)


def spans_of(timeline: Timeline, instructions: list[Instruction]) -> list[tuple[Instruction, float, float]]:
    """Begin and end of each instruction, as a recorder has them, of a step on the simulator's clock."""
    stalls = {stall.node: stall.us for stall in timeline.stalls}
    begins = [us - stalls.get(i.node.name, 0.0) for i, us in zip(instructions, timeline.instants_us, strict=True)]
    return list(zip(instructions, begins, [*begins[1:], timeline.step_us], strict=True))


@pytest.mark.parametrize("rate", [20, 2, 1])
def test_transfers_that_are_timed_took_so_long(rate):
    """On the simulator's clock, where the truth is known: none is timed wrong, and of a slow network most are timed."""
    truth = another()
    links = truth.within.model_copy(update={"bytes_per_s": 1e8 * rate})
    truth = truth.model_copy(update={"within": links})
    plan = make_plan(a_run().graph(), only_step=True)
    timeline = step_of(a_run(), truth)
    took = {s.node: s.end_us - s.start_us for s in timeline.spans if s.lane == "comm"}
    instructions = [*plan.forward.instructions, *plan.backward.instructions]
    found = dict(transfers_us(spans_of(timeline, instructions)))
    assert found == {name: pytest.approx(took[name]) for name in found}
    exposed = sum(stall.us > EXPOSED_US for stall in timeline.stalls)
    assert len(found) >= 0.5 * exposed > 0


def trained(num_steps: int, record: Path | None) -> list[float]:
    torch.manual_seed(0)
    model = zgraph.compile(built(Mlp), stage=3, record=record)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(num_steps):
        loss = model(*rows(step))
        with torch.no_grad():
            model.eval()(*rows(step))  # a forward without a backward is no step
            model.train()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_is_recorded_and_stays_what_it_is(tmp_path):
    folder = tmp_path / "costs"
    assert trained(20, folder) == trained(20, None)
    found = read_record(folder)
    assert found.ranks[0].num_steps == 2, "the fourth and the sixteenth"
    assert found.num_steps == 16, "without these, and the first two"
    measured = found.nodes_us
    computes = {n.name for n in found.run.graph().nodes if n.op in ("aten.mm.default", "aten.addmm.default")}
    assert computes
    assert computes <= measured.keys()
    assert all(us > 0 for us in measured.values())
    assert found.quantile_us(0.0) <= found.step_us <= found.quantile_us(1.0)
    calibrated = zgraph.calibrate(folder)
    assert calibrated.runs[0].after_us == pytest.approx(found.step_us, rel=0.7), "a busy machine is no clock"
    model = built(Mlp)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=r"has a record already .*; take another folder"):
        zgraph.compile(model, stage=3, record=folder)
    with pytest.raises(UsageError, match="cannot be a folder: Not a directory; take another"):
        zgraph.compile(model, stage=3, record=folder / RUN / "below")
    assert {name: id(p) for name, p in model.named_parameters()} == before, "the model is as it was"


def test_micro_steps_that_reduce_nothing_are_no_steps(tmp_path):
    torch.manual_seed(0)
    model = zgraph.compile(built(Mlp), stage=0, record=tmp_path / "costs")
    for step in range(14):
        with nullcontext() if step % 2 else zgraph.no_sync(model):
            model(*rows(step)).backward()
    found = read_record(tmp_path / "costs")
    assert found.ranks[0].num_steps == 1
    assert found.num_steps == 5, "of seven, the second was a warm-up's, and the fourth of all was taken apart"


def test_pieces_are_not_recorded(tmp_path):
    with pytest.raises(UsageError, match="a forward in pieces has none"):
        zgraph.compile(built(Mlp), fullgraph=False, record=tmp_path / "costs")


def broken(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / RUN).unlink(), "train with zgraph.compile"),
        (lambda f: rank_files(f, 1)[0].unlink(), "each rank writes its own"),
        (lambda f: broken(f, "rank-0.json", "{"), "is no record"),
        (lambda f: broken(f, "rank-0.json", "[" * 100_000), "is no record"),
        (lambda f: broken(f, "rank-0.json", rank_files(f, 1)[0].read_text()), "is of rank 1"),
        (
            lambda f: broken(f, "rank-0.json", json.dumps({"rank": 0, "num_steps": 1, "nodes": {"mm": -1}})),
            "greater than or equal to 0",
        ),
        (
            lambda f: broken(f, "rank-0.json", json.dumps({"rank": 0, "num_steps": 1, "nodes": {"\x1b[2J": 1}})),
            "of another graph",
        ),
        (lambda f: broken(f, "rank-0.steps", "1.0\nnan\n"), "line 2 is no time"),
        (lambda f: broken(f, "rank-0.steps", "9" * 30 + "\n"), "line 1 is no time"),
        (lambda f: broken(f, "rank-0.steps", "17"), "has no step yet"),
        (lambda f: (f / "rank-0.steps").write_bytes(b"\xff\xfe"), "cannot read"),
    ],
)
def test_damaged_records_are_refused(tmp_path, change, said):
    folder = recorded(tmp_path / "costs", a_run(), hardware(SLOW))
    change(folder)
    with pytest.raises(RecordError, match=said) as error:
        read_record(folder)
    assert "\x1b" not in str(error.value)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    folder = recorded(tmp_path / "costs", a_run(), hardware(SLOW))
    with rank_files(folder, 0)[1].open("a") as stream:
        stream.write("12")
    assert read_record(folder).num_steps == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "mine.json"}, "the ending .toml"),
        ({"name": "h100"}, "is a profile's or none"),
        ({"name": "../x"}, "is a profile's or none"),
    ],
)
def test_profiles_have_names_of_their_own(tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        zgraph.calibrate(recorded(tmp_path / "costs", a_run(), hardware(SLOW)), **options)
    with pytest.raises(UsageError, match="takes the folders of records"):
        zgraph.calibrate()
