"""Training on a device as a GPU's runtime sees it: losses are those of plain training, and the log has no race."""

from collections.abc import Callable

import pytest

from tests.deep import deep
from tests.emulated.cases import CASES, OFTEN, drawn
from tests.emulated.server import Server
from tests.emulated.training import Trained, train

NUM_DRAWN, NUM_DRAWN_DEEP = 4, 40

ALL = [*OFTEN, *(deep(name) for name in CASES if name not in OFTEN)]
SEEDS = [*range(NUM_DRAWN), *(deep(seed) for seed in range(NUM_DRAWN, NUM_DRAWN_DEEP))]


def assert_right(found: Trained, *, is_exact: bool) -> None:
    assert found.losses == pytest.approx(found.expected, rel=2e-5 if is_exact else 3e-2)
    assert found.races == []


@pytest.mark.parametrize("name", ALL)
def test_training_is_that_of_plain_eager(trained: Callable[[str], Trained], name: str) -> None:
    assert_right(trained(name), is_exact=CASES[name].is_exact)


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_nets_and_recipes(echoes: Server, seed: int) -> None:
    case = drawn(seed)
    found: Trained = echoes.run(train, case)
    assert_right(found, is_exact=case.is_exact)


def test_there_are_many_cases() -> None:
    assert len(CASES) + NUM_DRAWN_DEEP >= 100
    assert set(OFTEN) <= CASES.keys()


def test_the_cases_run_what_they_are_for(trained: Callable[[str], Trained]) -> None:
    """Arenas, buckets, and all streams: nothing is planned away."""
    assert trained("stage 3, arena").num_arena > 10
    grouped = trained("stage 3, grouped, 2 micro-steps")
    assert grouped.num_arena > 0
    assert grouped.ops["all_gather_start"] < trained("stage 3, arena").ops["all_gather_start"]
    assert trained("stage 0, buckets").ops["pack"] > 0
    assert len(trained("grid, stage 3").streams) == 3  # on a fourth, the second reduction waits for the first
    assert trained("offload activations").ops["offload_start"] > 0
    assert trained("offload activations by a budget").ops["reload_start"] > 0
    assert len(trained("offload parameters on a grid").streams) == 5
