"""When arenas are registered: by what the environment says, the budget, and whether all ranks are there."""

from types import SimpleNamespace

import pytest
import torch

from zgraph.environment import environment
from zgraph.errors import UsageError
from zgraph.ir import Graph, Plan, Program
from zgraph.runtime import arenas as arenas_of
from zgraph.runtime.arenas import Arenas, most_bytes

GPU = torch.device("cuda", 0)


def plan(num_bytes, backward_bytes=0):
    def program(name, size):
        return Program(name, (), (), (), arena_bytes=size)

    return Plan(Graph("g"), program("forward", num_bytes), program("backward", backward_bytes), None, ())


@pytest.fixture
def asked(monkeypatch):
    """What is asked of the group, whose blocks are the processor's."""
    found = []

    def block(num_bytes, device, group):
        def register(*, symmetric):
            found.append((num_bytes, symmetric))
            return ""

        memory = torch.empty(num_bytes, dtype=torch.uint8)
        return SimpleNamespace(memory=memory, register=register, release=lambda: None)

    monkeypatch.setattr(arenas_of, "pooled_block", block)
    return found


def made(kind="registered", group="group"):
    return Arenas(GPU, lambda: group, kind)


def test_a_block_serves_all_plans_that_fit_in_it(asked):
    arenas = made()
    for size in (1024, 512, 2048, 1024):
        arenas.reserve(plan(512, size), together=True)
    assert asked == [(1024, False), (2048, False)]
    assert arenas.kept_bytes == 1024 + 2048  # a recording may hold the first
    assert most_bytes(plan(512, 1024)) == 1024


@pytest.mark.parametrize(
    ("arenas", "together", "words"),
    [
        (made("plain"), True, "ZGRAPH_ARENAS=plain"),
        (made(group=None), True, "one rank has no collectives"),
        (made("symmetric"), False, "this rank met sizes alone"),
    ],
)
def test_why_a_block_is_not_registered(asked, arenas, together, words):
    arenas.reserve(plan(1024), together=together)
    assert asked == []
    assert words in arenas.state


def test_windows_are_made_by_all_ranks_together(asked):
    arenas = made("symmetric")
    arenas.reserve(plan(1024), together=True)
    arenas.reserve(plan(4096), together=False)
    assert asked == [(1024, True)]
    assert "as a window on all ranks" in arenas.state


def test_nothing_is_registered_without_arenas_or_on_processors(asked):
    arenas = made()
    arenas.reserve(plan(0), together=True)
    assert arenas.state == ""
    on_processor = Arenas(torch.device("cpu"), lambda: "group", "registered")
    on_processor.reserve(plan(1024), together=True)
    assert (asked, on_processor.state) == ([], "")


def test_the_budget_leaves_room_or_not(asked):
    arenas = made()
    arenas.room_bytes = 1023
    arenas.reserve(plan(1024), together=True)
    assert "the budget has no room" in arenas.state
    arenas.room_bytes = 1024
    arenas.reserve(plan(1024), together=True)
    assert asked == [(1024, False)]


def test_a_kind_that_is_none(monkeypatch):
    monkeypatch.setenv("ZGRAPH_ARENAS", "fast")
    with pytest.raises(UsageError, match="registered, symmetric or plain"):
        environment()
