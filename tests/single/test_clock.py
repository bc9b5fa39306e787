"""The clock of devices, on a pretended GPU whose host is slow: it times the device."""

import pytest
import torch

from tests.single.gpu import Gpu
from zgraph.compiler import profiler
from zgraph.ir import Instruction
from zgraph.runtime import clock
from zgraph.runtime.clock import Clock
from zgraph.runtime.recorder import Recorder


def test_a_short_op_is_timed_without_its_launch(monkeypatch):
    gpu = Gpu(launch_s=20e-6)
    cold = Clock(gpu.install(monkeypatch), is_cold=True)

    def run() -> None:
        for _ in range(6):  # op by op
            gpu.launch(2e-6)

    host_s = cold.host_s(run)
    assert host_s == pytest.approx(120e-6)
    assert cold.seconds(run, 3, host_s) == pytest.approx([12e-6] * 3)
    assert cold.seconds(run, 1, host_s, 10) == pytest.approx([12e-6])
    assert Clock(cold.device, is_cold=False).seconds(run, 2, host_s) == pytest.approx([120e-6] * 2, rel=0.05)


def test_launches_in_a_row_hide_what_the_host_takes(monkeypatch):
    gpu = Gpu(launch_s=20e-6)
    warm = Clock(gpu.install(monkeypatch), is_cold=False)
    assert warm.seconds(lambda: gpu.launch(1e-3), 2, 0.0, 10) == pytest.approx([1e-3] * 2, rel=0.01)
    assert warm.host_s(lambda: gpu.launch(1e-6), 200) == pytest.approx(20e-6), "the host alone"


def test_on_a_processor_it_is_the_hosts(monkeypatch):
    gpu = Gpu()
    gpu.install(monkeypatch)
    on_host = Clock(torch.device("cpu"), is_cold=True)
    assert not on_host.is_cold
    assert on_host.seconds(lambda: gpu.launch(1.0), 2, 0.0, 3) == pytest.approx([20e-6] * 2)


def test_the_cold_memory_is_what_there_is_room_for(monkeypatch):
    asked = []

    def empty(num_bytes: int, **_: object) -> str:
        asked.append(num_bytes)
        if num_bytes > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "memory"

    monkeypatch.setattr(torch, "empty", empty)
    limit = 100 << 20
    assert clock._room(torch.device("cuda", 0)) == "memory"
    assert asked == [512 << 20, 256 << 20, 128 << 20, 64 << 20]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        clock._room(torch.device("cuda", 0))


def test_a_recorder_makes_its_events_before_the_program_begins(monkeypatch):
    """An event that was made between two ops would be counted with the second."""
    gpu = Gpu(launch_s=1e-6, event_s=50e-6)
    recorder = Recorder(gpu.install(monkeypatch))
    parts = tuple(Instruction(object(), ()) for _ in range(3))
    for _ in range(2):
        recorder.begin(parts)
        for us in (4, 5, 6):
            gpu.launch(us * 1e-6)
            recorder.mark()
    assert [us for _, us in recorder.means_us()] == pytest.approx([5, 5, 6])  # the first waits for its launch


def test_a_run_that_broke_off_ends_there(monkeypatch):
    gpu = Gpu(launch_s=1e-6)
    recorder = Recorder(gpu.install(monkeypatch))
    recorder.begin(tuple(Instruction(object(), ()) for _ in range(9)))
    gpu.launch(4e-6)
    recorder.mark()
    assert [us for _, us in recorder.means_us()] == pytest.approx([5])


class Alone:
    """Stands for the session of one of four ranks."""

    num_ranks = num_shards = 4

    def __init__(self, device: torch.device, gpu: Gpu) -> None:
        self.device, self.synchronize = device, gpu.synchronize


def test_the_latency_and_the_rate_of_collectives_are_those_of_the_wire(monkeypatch):
    """However long the host takes to call NCCL."""
    gpu = Gpu(launch_s=40e-6)
    device = gpu.install(monkeypatch)

    def exchange(kind: str, session: Alone, numel: int, count: int):
        return lambda: [gpu.launch(8e-6 + 4 * numel * 0.75 / 300e9) for _ in range(count)]

    monkeypatch.setattr(profiler, "exchange", exchange)
    points = profiler._transfers(Alone(device, gpu), 3)
    latency_us, rate = profiler._lines(points)["all_gather"]
    assert latency_us == pytest.approx(8, rel=0.01)
    assert rate == pytest.approx(300e9, rel=0.01)
    assert max(size for size, _ in points["all_gather"]) == 0.75 * (256 << 20)
