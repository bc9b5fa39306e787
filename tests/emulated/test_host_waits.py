"""How often the host stands still for the device in a step, once everything is compiled."""

from collections.abc import Callable

import pytest

from tests.emulated.cases import CASES, OFTEN
from tests.emulated.server import Server
from tests.emulated.snippets import clipped, engine_steps
from tests.emulated.training import Trained


def is_plain(name: str) -> bool:
    case = CASES[name]
    return not case.options.get("offload") and not case.optimizer and case.options.get("fullgraph") != "eager"


@pytest.mark.parametrize("name", [name for name in OFTEN if is_plain(name)])
def test_no_step_waits(trained: Callable[[str], Trained], name: str) -> None:
    assert trained(name).host_waits[1:] == [{}] * (CASES[name].num_steps - 1)


OFFLOADED = [name for name in OFTEN if CASES[name].options.get("offload") and CASES[name].optimizer is None]


@pytest.mark.parametrize("name", OFFLOADED)
def test_a_backward_waits_at_most_once_for_gradients_on_the_host(trained: Callable[[str], Trained], name: str) -> None:
    for waits in trained(name).host_waits[1:]:
        assert sum(waits.values()) <= CASES[name].num_micro_steps, waits


def test_states_that_are_streamed_lie_in_pinned_memory(trained: Callable[[str], Trained]) -> None:
    """Copies from and to other memory would make the host wait."""
    for waits in trained("masters on the host, updated on the device").host_waits[1:]:
        assert not any("blocks" in place for place in waits), waits


@pytest.mark.parametrize("stage", range(4))
def test_clipping_does_not_wait(echoes: Server, stage: int) -> None:
    assert echoes.run(clipped, stage) == {}


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_step_of_the_engine_waits_for_the_step_before_at_most(echoes: Server, limit: float) -> None:
    """Whether that one counted. The device here takes the memory that torch pins for the number for pageable."""
    assert echoes.run(engine_steps, limit) in (
        {},
        {"Later.__float__ < Undecided.was_left_out < Engine._settle": 1, "copy that blocks": 1},
    )
