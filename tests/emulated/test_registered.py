"""Arenas that NCCL knows: allocated in a pool of its own, registered with the group, and kept between steps."""

import re

import pytest

from tests.deep import deep
from tests.emulated import registered
from tests.emulated.registered import Found
from tests.emulated.server import Server
from tests.patience import slowness


def trained(echoes: Server, backend: dict | None, **options) -> Found:
    found: Found = echoes.run(registered.train, {}, backend, **options)
    assert found.losses[: len(found.plain)] == found.plain
    assert found.races == []
    return found


@pytest.mark.parametrize("records", [False, True])
def test_collectives_read_and_write_registered_memory(echoes: Server, records: bool) -> None:
    found = trained(echoes, {}, records=records)
    assert found.calls == ["register"]
    assert found.state.startswith("registered with NCCL; ")
    assert found.num_inside > 10


def test_the_group_forgets_memory_that_is_gone(echoes: Server) -> None:
    assert echoes.run(registered.released) == ["register", "deregister"]


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (None, "registers no memory with object"),
        ({"has_memory": False}, "NCCL has no memory of its own for this GPU"),
        ({"problem": "NCCL is too old"}, "NCCL is too old"),
    ],
)
def test_where_it_cannot_be_memory_is_taken_for_each_run(echoes: Server, backend: dict | None, words: str) -> None:
    found = trained(echoes, backend)
    assert found.num_inside == 0
    assert found.state.startswith("not registered: ")
    assert words in found.state


@pytest.mark.parametrize(
    ("fault", "kinds", "words"),
    [
        ("memory", ("PeerError", "BudgetError"), "rank 1 cannot register .* MiB as a window on all ranks: OutOfMemory"),
        ("both", ("", ""), "not registered: OutOfMemoryError: CUDA out of memory"),
        deep("old", ("", ""), "not registered: TypeError"),
        deep("registering", ("PeerError", "PeerError"), "rank 1 cannot register .*: RuntimeError: invalid usage"),
    ],
)
def test_no_rank_waits_for_one_that_has_no_window(pair: Server, fault: str, kinds: tuple, words: str) -> None:
    """All ranks raise within seconds, where one alone has none; where none has one, all go on without."""
    answers = pair.run(registered.windows, fault, limit_s=60)
    assert tuple(kind for kind, *_ in answers) == kinds
    for _, said, seconds, has_block in answers:
        assert re.search(words, said)
        assert seconds < 30 * slowness()
        assert not has_block
        assert "ZGRAPH_ARENAS=registered" in said or not kinds[0]
    if fault == "registering":
        pair.stop()  # no model of these ranks can go on
