"""Generated kernels on several ranks: the training is DDP's, up to the rounding that kernels leave out."""

import pytest
from torch.distributed.device_mesh import DeviceMesh

import zgraph

from . import zoo
from .lockstep import Lockstep, assert_same
from .pool import Pool


def train(mesh: DeviceMesh, name: str, stage: int) -> tuple[tuple[float, float], int]:
    pair = Lockstep(mesh, zoo.builder(name), stage=stage, kernels="triton")
    for step in range(5):
        pair.step(zoo.batch(name, 100 * step + pair.rank))
    (entry,) = zgraph.report(pair.ours.model).entries
    return pair.errors, sum(n.op == "zgraph.rows.default" for n in entry.plan.graph.nodes)


@pytest.mark.parametrize(("name", "stage"), [("llama", 0), ("llama", 3), ("vit", 2), ("mixtral", 3)])
def test_training_with_kernels_is_that_of_ddp(pool: Pool, name: str, stage: int) -> None:
    answers = pool.run(train, 2, name, stage)
    assert_same([errors for errors, _ in answers])
    assert all(num_kernels > 4 for _, num_kernels in answers)
