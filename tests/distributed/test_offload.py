"""What lies on the host of each rank: losses, gradients and checkpoints stay what they are without."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph

from .lockstep import Lockstep, assert_same
from .nets import Odd, Tied, built, rows, words
from .pool import Pool
from .test_memory import llama, measured_peak

STAGES = pytest.mark.parametrize("stage", range(4))
OFFLOADS = pytest.mark.parametrize("offload", ["optimizer", "parameters"])


def train(mesh: DeviceMesh, stage: int, offload: str) -> tuple[tuple[float, float], list[int]]:
    """Two micro-steps a step, the first without sync; clipping; a state dict taken and given back."""
    pair = Lockstep(mesh, built(Tied), stage=stage, offload=offload)

    def clip(side) -> None:
        nn.utils.clip_grad_norm_(side.model.parameters(), 0.5)

    for step in range(4):
        pair.step(words(10 * step + pair.rank), words(10 * step + pair.rank + 5), no_sync=True, before_update=clip)
        model = pair.ours.model
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    report = zgraph.report(pair.ours.model)
    return pair.errors, [report.rest_bytes, report.state_bytes, report.host_bytes]


@STAGES
@OFFLOADS
def test_training_is_that_of_ddp(pool: Pool, stage: int, offload: str) -> None:
    answers = pool.run(train, 2, stage, offload)
    assert_same([errors for errors, _ in answers])
    for _, (rest_bytes, state_bytes, host_bytes) in answers:
        assert state_bytes == 0
        assert (rest_bytes == 0) == (offload == "parameters")
        assert host_bytes > 0


def shapes(mesh: DeviceMesh, grouped: bool) -> tuple[float, float]:
    recipe = zgraph.recipe(3).replace("all-gather", f"all-gather(grouped={str(grouped).lower()})")
    pair = Lockstep(mesh, built(Odd), passes=recipe, offload="parameters")
    for step in range(3):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize("grouped", [False, True])
def test_uneven_shards_on_the_host(pool: Pool, grouped: bool) -> None:
    assert_same(pool.run(shapes, 3, grouped))


def tight(mesh: DeviceMesh, stage: int, budget: int | None, offload: object) -> tuple[list[float], int, int, int]:
    """Losses, the bytes alive at the peak of a step, those predicted, and copies to the host."""
    torch.manual_seed(0)
    model = zgraph.compile(llama(), stage=stage, mesh=mesh, memory_budget=budget, offload=offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(4001, (2, 64), generator=torch.Generator().manual_seed(mesh.get_local_rank()))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    report = zgraph.report(model)
    (entry,) = report.entries
    moved = sum(n.op == "offload_start" for n in entry.plan.graph.nodes)
    rest = report.rest_bytes + report.state_bytes + report.buffer_bytes
    return losses, rest + measured_peak(model), rest + report.step_peak_bytes, moved


@STAGES
def test_a_tight_budget_trains_the_same(pool: Pool, stage: int) -> None:
    plain = pool.run(tight, 2, stage, None, None)
    everything = pool.run(tight, 2, stage, None, ("parameters", "activations"))
    for (losses, alive, predicted, moved), (same, lower, foretold, copies) in zip(plain, everything, strict=True):
        assert same == losses
        assert moved == 0 < copies
        assert lower < alive
        for told, measured in ((predicted, alive), (foretold, lower)):
            assert measured <= 1.03 * told
            assert stage == 0 or told <= 1.03 * measured, "what two all-reduces receive may be counted twice"
    budget = (plain[0][2] + everything[0][2]) // 2
    tightened = pool.run(tight, 2, stage, budget, ("optimizer", "activations"))
    for (losses, *_), (same, alive, _, _) in zip(plain, tightened, strict=True):
        assert same == losses
        assert alive <= budget + 64, "the loss is the caller's"
