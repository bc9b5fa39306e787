"""What lies on the host of each rank: losses, gradients and checkpoints stay what they are without."""

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph

from .lockstep import Lockstep, assert_same
from .nets import Odd, Tied, built, rows, words
from .pool import Pool

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
