"""Programs that the device repeats from recordings compute what they compute op by op, whoever holds their results."""

from dataclasses import replace

import pytest

from tests.deep import deep
from tests.emulated import recordings
from tests.emulated.case import Case
from tests.emulated.cases import CASES, drawn
from tests.emulated.server import Server
from tests.emulated.test_host_waits import is_plain
from tests.emulated.training import Trained, train

NUM_STEPS = 5

OFTEN = ("one rank", "stage 3, grouped, 2 micro-steps", "stage 1, 3 micro-steps", "offload activations")
MORE = (
    "stage 0, buckets",
    "stage 2",
    "stage 3, arena",
    "stage 3, buckets",
    "grid, stage 3",
    "uneven over three",
    "tied",
    "attention",
    "bf16",
    "kernels, one rank",
    "offload optimizer, stage 1",
    "offload parameters, grouped",
    "offload parameters, evaluated",
    "offload all",
    "states on the host",
)


def recorded(name: str) -> Case:
    """The case with recordings."""
    case = CASES[name]
    return replace(case, options={**case.options, "cuda_graphs": True}, num_steps=NUM_STEPS)


@pytest.mark.parametrize("name", [*OFTEN, *(deep(name) for name in MORE)])
def test_training_is_that_of_plain_eager(echoes: Server, name: str) -> None:
    found: Trained = echoes.run(train, recorded(name), leaves_out=False)
    assert found.losses == pytest.approx(found.expected, rel=2e-5 if CASES[name].is_exact else 3e-2)
    assert found.races == []
    assert "recordings, programs replayed" in found.recordings[0]
    assert "replayed 0 times" not in found.recordings[0]
    assert "op by op" not in found.recordings[0]
    if is_plain(name):
        assert found.host_waits[1:] == [{}] * (NUM_STEPS - 1)


@pytest.mark.parametrize("seed", [0, *(deep(seed) for seed in range(1, 30))])
def test_drawn_nets_and_recipes(echoes: Server, seed: int) -> None:
    case = drawn(seed)
    case = replace(case, options={**case.options, "cuda_graphs": True}, num_steps=NUM_STEPS)
    found: Trained = echoes.run(train, case, leaves_out=False)
    assert found.losses == pytest.approx(found.expected, rel=2e-5)
    assert found.races == []


@pytest.mark.parametrize(
    "job",
    [
        recordings.kept_results,
        recordings.gradients_that_add_up,
        recordings.two_backwards,
        recordings.fails_while_it_is_recorded,
        recordings.recorded_one_by_one,
    ],
)
def test_results_are_their_holders(echoes: Server, job) -> None:
    distance, said = echoes.run(job, "residual")
    assert distance == 0
    assert "op by op" not in said
    assert "replayed 0 times" not in said


def test_a_forward_whose_values_wait_is_not_repeated(echoes: Server) -> None:
    distance, said = echoes.run(recordings.two_forwards_first, "residual")
    assert distance == 0
    assert "1 forwards op by op, as a backward was to come" in said
    assert "1 programs op by op, as what they read had moved" in said


def test_random_numbers_are_those_of_op_by_op(echoes: Server) -> None:
    distance, said = echoes.run(recordings.draws)
    assert distance == 0
    assert "left to the host" not in said


def test_outputs_of_inference_are_their_holders(echoes: Server) -> None:
    distance, said = echoes.run(recordings.inference)
    assert distance == 0
    assert said.count("programs replayed 2 times") == 2


def test_streams_follow_one_another(echoes: Server) -> None:
    races, left_out, _, distance = echoes.run(recordings.another_stream, "residual")
    assert races == []
    assert distance == 0
    assert any(found for site, found in left_out.items() if "Turns.follow" in site)


def test_what_cannot_be_recorded_runs_op_by_op(echoes: Server) -> None:
    distance, said = echoes.run(recordings.cannot_be_recorded, "residual")
    assert distance == 0
    assert "2 not recorded: " in said
    assert "operation not permitted when stream is capturing" in said


@pytest.mark.parametrize(
    "name",
    [
        "inputs are not copied",
        "results are not copied",
        "nobody asks who holds what waits",
        "addresses are not compared",
        "the run that is recorded is not replayed",
        "memory of what waits is given to others",
    ],
)
def test_a_fault_is_found(echoes: Server, name: str) -> None:
    assert not echoes.run(recordings.spoiled, name) < 1e-6
