"""The emulated device, and the detector of races on it."""

import pytest

from tests.emulated import snippets
from tests.emulated.case import Case
from tests.emulated.reference import losses
from tests.emulated.server import Server
from zgraph.bridge.target import usable_bytes


@pytest.mark.parametrize("job", [snippets.two_streams, snippets.freed_while_read, snippets.read_by_the_host])
def test_a_race_is_found_where_nobody_waits(echoes: Server, job) -> None:
    assert echoes.run(job, waits=True) == 0
    assert echoes.run(job, waits=False) == 1


def test_parts_of_one_memory_are_told_apart(echoes: Server) -> None:
    assert echoes.run(snippets.parts_of_one_memory, overlap=False) == 0
    assert echoes.run(snippets.parts_of_one_memory, overlap=True) == 1


@pytest.mark.parametrize(
    ("what", "num_waits"), [("item", 1), ("cpu", 1), ("mask", 1), ("pageable", 1), ("pinned", 0), ("add", 0)]
)
def test_the_host_waits_where_it_does_on_a_gpu(echoes: Server, what: str, num_waits: int) -> None:
    assert echoes.run(snippets.waits_of, what) == num_waits


def test_memory_has_a_limit(echoes: Server) -> None:
    message, after, before = echoes.run(snippets.out_of_memory)
    assert message.startswith("CUDA out of memory. Tried to allocate 400384 bytes")
    assert after == before


def test_a_first_step_that_runs_out_of_memory_leaves_the_model_as_it_was(echoes: Server) -> None:
    message, losses, unharmed = echoes.run(snippets.out_of_memory_in_the_first_step, 25)
    assert message.startswith("CUDA out of memory")
    assert losses == unharmed


@pytest.mark.parametrize("total_bytes", [80 << 30, 6_000_000])
def test_defaults_of_a_gpu(echoes: Server, total_bytes: int) -> None:
    """A budget of at most 94 %, what does not fit on the host, and a thread of autograd's."""
    found = echoes.run(snippets.defaults, total_bytes)
    expected = losses(Case(net="deep", num_rows=1024, num_steps=2))
    assert found["budget"] == usable_bytes(total_bytes, echoes.num_ranks) <= 0.94 * total_bytes
    assert found["has its thread"]
    assert found["races"] == []
    assert found["losses"] == pytest.approx(expected, rel=2e-5)
    assert ("offload_start" in found["ops"]) == (total_bytes < 80 << 30)


def test_a_capture_is_that_of_a_gpu(echoes: Server) -> None:
    ops = echoes.run(snippets.captured_ops)
    assert any("_scaled_dot_product_flash_attention" in op and "for_cpu" not in op for op in ops), ops
