"""A memory budget: what it lets stay, that it holds, and what is said where it cannot."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from benchmarks.memory import measure
from tests.deep import deep
from zgraph.errors import BudgetError, HardwareError, UsageError

from .lockstep import Lockstep, assert_same
from .nets import Decoder, Mlp, built, rows, sentences
from .pool import Pool
from .test_memory import llama, measured_peak


def sent_and_losses(mesh: DeviceMesh, budget: str | None) -> tuple[float, list[float]]:
    """Bytes sent over those of the model, and three losses."""
    torch.manual_seed(0)
    model = zgraph.compile(llama(), stage=3, mesh=mesh, memory_budget=budget)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        ids = torch.randint(4001, (2, 64), generator=torch.Generator().manual_seed(10 * step + mesh.get_local_rank()))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report = zgraph.report(model)
    return report.sent_bytes / report.whole_bytes, losses


def test_what_there_is_room_for_is_not_sent_again(pool: Pool) -> None:
    (usual, losses), (roomy, same) = (pool.run(sent_and_losses, 2, budget)[0] for budget in (None, "1GiB"))
    assert 1.2 < usual <= 1.51
    assert roomy == pytest.approx(1.0, abs=0.01)
    assert same == losses


def peak(mesh: DeviceMesh, budget: int) -> tuple[float, int]:
    """Bytes sent over those of the model, and the most bytes alive, with those that AdamW would hold."""
    model = zgraph.compile(llama(), stage=3, mesh=mesh, memory_budget=budget)
    measured = measured_peak(model)
    report = zgraph.report(model)
    rest = 3 * report.rest_bytes + report.buffer_bytes
    return report.sent_bytes / report.whole_bytes, rest + measured


@pytest.mark.parametrize("budget", [26_700_000, deep(27_500_000), 29_000_000, deep(32_000_000), deep(60_000_000)])
def test_the_budget_holds(pool: Pool, budget: int) -> None:
    for _, alive in pool.run(peak, 2, budget):
        assert alive <= budget + 64, "the loss is the caller's"


def too_small(mesh: DeviceMesh, budget: int) -> str:
    model = zgraph.compile(llama(), stage=3, mesh=mesh, memory_budget=budget)
    ids = torch.randint(4001, (2, 64))
    with pytest.raises(BudgetError) as caught:
        model(input_ids=ids, labels=ids)
    return str(caught.value)


def test_a_budget_that_cannot_hold_names_the_smallest_that_can(pool: Pool) -> None:
    first, second = pool.run(too_small, 2, 20_000_000)
    assert first == second
    smallest = int(first.split(" is the smallest that can")[0].split()[-1].replace(",", ""))
    assert 20_000_000 < smallest < 40_000_000
    assert pool.run(peak, 2, smallest)[0][1] <= smallest + 64, "the loss is the caller's"


@dataclass(frozen=True)
class Trained:
    """Losses, the bytes alive at the peak of a step, those predicted; nodes that run again, and copies to the host."""

    losses: list[float]
    alive: int
    predicted: int
    again: int
    moved: int


def trained(mesh: DeviceMesh, stage: int, budget: int | None, offload: tuple[str, ...]) -> Trained:
    model = zgraph.compile(built(Decoder)(), stage=stage, mesh=mesh, memory_budget=budget, offload=offload)
    losses = []

    def prepare() -> Callable[[int], torch.Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = [sentences(10 * number + mesh.get_local_rank()) for number in range(3)]

        def step(number: int) -> torch.Tensor:
            loss = model(*batches[number])
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    gc.collect()  # what an earlier job left must not be freed in the measured step
    live = measure(prepare, warmup=2, device=torch.device("cpu"))
    report = zgraph.report(model)
    (entry,) = report.entries
    rest = report.rest_bytes + report.state_bytes + report.buffer_bytes
    again = sum("recompute" in n.origin.made_by for n in entry.plan.graph.nodes)
    moved = sum(n.op == "offload_start" for n in entry.plan.graph.nodes)
    return Trained(losses, rest + live.peak_bytes - live.rest_bytes, report.peak_bytes, again, moved)


def refusal(mesh: DeviceMesh, stage: int) -> int:
    """The smallest budget, as the error says."""
    model = zgraph.compile(built(Decoder)(), stage=stage, mesh=mesh, memory_budget=1_000_000)
    with pytest.raises(BudgetError) as caught:
        model(*sentences(0))
    return int(str(caught.value).split(" is the smallest that can")[0].split()[-1].replace(",", ""))


@pytest.mark.parametrize("stage", [deep(0), deep(1), deep(2), 3])
def test_a_tight_budget_trains_the_same(pool: Pool, stage: int) -> None:
    """With everything kept, everything moved, the smallest budget, and one between."""
    plain = pool.run(trained, 2, stage, None, ())
    everything = pool.run(trained, 2, stage, None, ("parameters", "activations"))
    (smallest, other) = pool.run(refusal, 2, stage)
    assert smallest == other
    assert smallest <= plain[0].predicted, "equal where the optimizer's step is the peak"
    for rank, moved in zip(plain, everything, strict=True):
        assert rank.moved == 0 < moved.moved
        assert moved.alive < rank.alive
    between = (smallest + plain[0].predicted) // 2
    moving = ("optimizer", "activations")
    budgets = {
        budget: pool.run(trained, 2, stage, budget, moving if budget == between else ())
        for budget in (smallest, between)
    }
    assert all(r.again > 0 for r in budgets[smallest]) or smallest == plain[0].predicted
    for budget, ranks in budgets.items():
        assert all(r.alive <= budget + 64 for r in ranks), "the loss is the caller's"
        assert all(r.predicted <= budget for r in ranks)
    for ranks in (everything, *budgets.values()):
        for rank, same in zip(plain, ranks, strict=True):
            assert same.losses == rank.losses
    for rank in (*plain, *everything):
        assert rank.alive <= 1.03 * rank.predicted
        assert stage == 0 or rank.predicted <= 1.03 * rank.alive, "what two all-reduces receive may be counted twice"


def refused(mesh: DeviceMesh) -> list[str]:
    said = []
    for options in ({"hardware": "h10"}, {"memory_budget": "lots"}, {"memory_budget": 0}, {"hardware": "no.json"}):
        model = built(Mlp)()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises((HardwareError, UsageError)) as caught:
            zgraph.compile(model, mesh=mesh, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        said.append(str(caught.value))
    return said


def test_bad_targets_are_refused_and_the_model_left_as_it_was(pool: Pool) -> None:
    unknown, lots, none, missing = pool.run(refused, 2)[0]
    assert "did you mean h100" in unknown
    assert '"12GiB"' in lots
    assert '"12GiB"' in none
    assert "cannot read the cost table no.json" in missing


def profiled(mesh: DeviceMesh, path: str) -> tuple[str, float, bool]:
    """The table as text, the predicted step, and whether training planned with it is DDP's."""
    model = zgraph.compile(built(Mlp)(), stage=3, mesh=mesh)

    def step() -> None:
        model.zero_grad()
        model(*rows(mesh.get_local_rank())).backward()

    table = zgraph.profile(model, step, path=path)
    pair = Lockstep(mesh, built(Mlp), stage=3, hardware=table)
    for count in range(3):
        pair.step(rows(10 * count + pair.rank))
    (entry,) = zgraph.report(pair.ours.model).entries
    assert_same([pair.errors])
    return table.model_dump_json(), entry.timeline.step_us, entry.gap >= 0


def test_a_profile_is_the_same_on_all_ranks_and_is_planned_with(pool: Pool, tmp_path) -> None:
    path = tmp_path / "costs.json"
    first, second = pool.run(profiled, 2, str(path))
    assert first == second
    assert first[1] > 0
    assert first[2]
    assert path.read_text().startswith("{")
