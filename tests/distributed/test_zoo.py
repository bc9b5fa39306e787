"""Models of many kinds train as under DDP: the same losses and the same gradients."""

import pytest
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import deep

from . import zoo
from .lockstep import Lockstep, assert_same
from .pool import Pool

NUM_STEPS = 20

# Each model meets every stage and two numbers of ranks; each stage meets every number of ranks. By default one each.
DESIGN = {
    "llama": {1: (0, 3), 4: (1, 2)},
    "gpt2": {2: (0, 1), 3: (2, 3)},
    "bert": {1: (1, 2), 4: (0, 3)},
    "mixtral": {2: (2, 3), 3: (0, 1)},
    "vit": {2: (1, 3), 4: (0, 2)},
    "resnet": {1: (0, 2), 3: (1, 3)},
}
ALWAYS = {
    ("llama", 4, 2),
    ("gpt2", 2, 1),
    ("bert", 1, 2),
    ("mixtral", 2, 3),
    ("vit", 4, 0),
    ("resnet", 3, 1),
}
CASES = [(m, n, s) for m, cells in DESIGN.items() for n, stages in cells.items() for s in stages]


def train(mesh: DeviceMesh, name: str, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, zoo.builder(name), stage=stage)
    for step in range(NUM_STEPS):
        pair.step(zoo.batch(name, 100 * step + pair.rank))
    assert len(zgraph.report(pair.ours.model).entries) == 1, "inputs of one shape are captured once"
    return pair.errors


@pytest.mark.parametrize(("name", "num_ranks", "stage"), [c if c in ALWAYS else deep(*c) for c in CASES])
def test_losses_and_gradients_are_those_of_ddp(pool: Pool, name: str, num_ranks: int, stage: int) -> None:
    assert_same(pool.run(train, num_ranks, name, stage))


def test_the_design_covers_what_it_says() -> None:
    assert {(m, s) for m, _, s in CASES} == {(m, s) for m in zoo.MODELS for s in range(4)}
    assert set(CASES) >= ALWAYS
    assert {(n, s) for _, n, s in CASES} == {(n, s) for n in range(1, 5) for s in range(4)}
