"""Arenas that NCCL knows: allocated in a pool of its own, registered with the group, and kept between steps."""

import pytest

from tests.emulated import registered
from tests.emulated.registered import Found
from tests.emulated.server import Server


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
