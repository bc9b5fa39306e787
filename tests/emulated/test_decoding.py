"""Decode that the device repeats from recordings (CUDA graphs): the tokens of a model that is not recorded."""

from collections.abc import Callable

import pytest

from tests.deep import deep
from tests.emulated import decoding
from tests.emulated.server import Server


def is_recorded(said: str) -> bool:
    """Whether no program has moved, and all could be recorded."""
    return "not recorded" not in said and "op by op" not in said


@pytest.mark.parametrize("kv", [None, deep("int8")])
def test_tokens_are_those_of_op_by_op(echoes: Server, kv: str | None) -> None:
    """So is what is in the cache; a step is one recording, as it writes to memory that stays."""
    is_same, said, num_replays, races = echoes.run(decoding.tokens, kv)
    assert is_same
    assert races == []
    assert said.startswith("decode: ")
    assert "ops in 1 recordings" in said
    assert "left to the host" not in said
    assert is_recorded(said)
    assert num_replays == 2 * (decoding.NUM_NEW - 1) - 3  # two warm-ups, and the run that is recorded


def test_requests_that_come_and_go(echoes: Server) -> None:
    is_same, said, num_replays = echoes.run(decoding.requests)
    assert is_same
    assert is_recorded(said)
    assert num_replays > 8


def test_weights_that_change_and_memory_that_moves(echoes: Server) -> None:
    is_same, said, num_replays = echoes.run(decoding.changed_weights)
    assert is_same
    assert is_recorded(said)
    assert num_replays == 3 * (decoding.NUM_NEW - 1) - 2 * 3  # it was recorded twice


@pytest.mark.parametrize("job", [deep(decoding.answers)])
def test_an_encoder_with_a_decoder(echoes: Server, job: Callable[[], tuple[bool, str, int]]) -> None:
    is_same, said, num_replays = echoes.run(job)
    assert is_same
    assert is_recorded(said)
    assert num_replays > decoding.NUM_NEW


def test_plain_forwards(echoes: Server) -> None:
    distance, said, num_replays = echoes.run(decoding.forwards)
    assert distance == 0
    assert is_recorded(said)
    assert num_replays == 2 * 2  # five calls of each size, of which three are not


def test_a_recording_that_writes_to_copies_is_found(echoes: Server) -> None:
    assert not echoes.run(decoding.copied_caches)
