"""The script for a lease of a GPU: its parts, rehearsed on the emulated device, and the driver that runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.errors import NoGpu
from benchmarks.lease import trace
from benchmarks.lease.driver import ROOT, Lease
from benchmarks.lease.parts import PARTS, Part, named
from benchmarks.lease.results import FILE, Emit, Result, read, write
from tests.deep import deep
from tests.emulated import broken
from tests.emulated.build import cache_folder

LIMIT_S = 300.0
"""For a machine that is busy."""

EXPECTED = {
    "machine": {"profile_machine", "copy on the device", "both ways"},
    "kernels": {"random numbers", "rms_norm_backward 40 f32", "matmul, gate f32", "rotary 8 of 16", "adamw 40 f32"},
    "parity": {"offload parameters bf16, peak", "in a budget, obeyed"},
    "sharded": {"offload parameters", "offload parameters, again", "offload parameters, to device late"},
    "steps": {"zgraph aten", "eager"},
    "nccl": {"name of grouped all-gathers", "name of abort"},
    "groups": {"residual + rmsnorm, Llama-3 8B: zgraph triton"},
}
"""Some results of each part."""


@pytest.fixture
def rehearsed(built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a part with small sizes on the emulated device."""
    monkeypatch.setenv("ZGRAPH_TESTS_CACHE", str(cache_folder()))
    monkeypatch.setenv("ZGRAPH_LOGS", "none")

    def run(name: str) -> list[Result]:
        part = named(name)
        patient = Part(part.name, part.proves, LIMIT_S, part.least_s, part.num_ranks)
        found = Lease(tmp_path, (patient,), LIMIT_S, True, "tests.emulated.rehearsal").run()
        assert [r.line for r in found if r.ok is False] == [], (tmp_path / f"{name}.log").read_text()[-3000:]
        return found

    return run


@pytest.mark.parametrize("name", ["machine", "kernels", "parity", deep("steps"), deep("nccl"), deep("groups")])
def test_a_part(rehearsed, name: str) -> None:
    assert_complete(rehearsed(name), name)


def assert_complete(found: list[Result], name: str) -> None:
    assert EXPECTED[name] | {"finished"} <= {result.name for result in found if result.part == name}
    assert sum(result.ok is True for result in found[:-1]) == found[-1].more["num_passed"]


def test_every_part_has_a_rehearsal() -> None:
    assert [part.name for part in PARTS] == [*EXPECTED]


def test_torch_has_the_names_that_the_runtime_calls(tmp_path: Path) -> None:
    from benchmarks.lease import nccl

    nccl.run(Emit(tmp_path, "nccl"), True)
    found, _ = read(tmp_path)
    assert {r.name: r.ok for r in found}.items() >= dict.fromkeys(EXPECTED["nccl"], True).items()
    assert all(r.ok for r in found)


def test_each_stream_is_late_in_turn(rehearsed) -> None:
    """On both ranks, at the head of each call, backward and update of three steps."""
    found = rehearsed("sharded")
    assert_complete(found, "sharded")
    late = {(r.name, r.more["rank"]): r.more["num_sleeps"] for r in found if r.name.endswith(" late")}
    streams = ("computing", "collectives", "to host", "to device")
    for rank in range(2):
        assert all(late[f"offload parameters, {stream} late", rank] == 15 for stream in streams)


# --- the driver -------------------------------------------------------------------------------------------------


def part(name: str, limit_s: float = 20.0, num_ranks: int = 1, least_s: float = 0.1) -> Part:
    return Part(name, "", limit_s, least_s, num_ranks)


def lease(folder: Path, *parts: Part, limit_s: float = 60.0) -> list[Result]:
    return Lease(folder, parts, limit_s, False, broken.__name__).run()


def is_alive(number: str) -> bool:
    status = Path("/proc", number, "stat")
    return status.exists() and status.read_text().rsplit(") ", 1)[1][0] not in "ZX"


def test_what_hangs_is_killed_and_what_comes_after_it_runs(tmp_path: Path) -> None:
    found = lease(tmp_path, part("hangs", 5.0), part("works"))
    assert [(r.part, r.name, r.ok) for r in found] == [
        ("hangs", "first", True),
        ("hangs", "killed", False),
        ("works", "first", True),
        ("works", "finished", None),
        ("lease", "summary", False),
    ]
    why = "it ran for more than 5 s after 'first'; the last line of hangs.log: about to sleep"
    assert found[1].more["error"] == why
    assert 5 <= found[1].seconds < 15
    assert not any(is_alive(number) for number in (tmp_path / "processes").read_text().split())


def test_what_breaks_down_goes_on_once_behind_what_it_has_done(tmp_path: Path) -> None:
    found = lease(tmp_path, part("aborts"), part("raises"), part("works"))
    assert [(r.part, r.name, r.ok) for r in found[:-1]] == [
        ("aborts", "first", True),
        ("aborts", "broke down", False),
        ("aborts", "second", True),
        ("aborts", "broke down", False),
        ("raises", "broke down", False),
        ("works", "first", True),
        ("works", "finished", None),
    ]
    assert found[1].more["error"].startswith("signal SIGABRT after 'first'; ")
    assert found[4].more["error"] == "exit code 1; the last line of raises.log: ValueError: no such thing"
    assert (found[-1].value, found[-1].more["num_passed"]) == (3, 3)


def test_a_rank_that_fails_ends_the_other(tmp_path: Path) -> None:
    found = lease(tmp_path, part("one_rank_fails", 30.0, num_ranks=2))
    assert [(r.name, r.ok) for r in found[:-1]] == [("broke down", False)]
    assert found[0].seconds < 25


def test_the_last_parts_are_left_out_where_the_time_is_over(tmp_path: Path) -> None:
    found = lease(tmp_path, part("hangs", 30.0), part("works", least_s=4.0), limit_s=8.0)
    assert [(r.part, r.name) for r in found[:-1]] == [("hangs", "first"), ("hangs", "killed"), ("works", "left out")]
    assert found[-1].more["left_out"] == ["works"]


def test_without_a_gpu_nothing_else_is_tried(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.lease", "--out", str(tmp_path), "--only", "machine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert (
        "finds no GPU. A lease needs one GPU of NVIDIA, its driver, and a torch that is built with CUDA" in done.stderr
    )


def test_a_part_without_a_gpu_ends_the_lease(tmp_path: Path) -> None:
    with pytest.raises(NoGpu, match="there is no GPU here"):
        lease(tmp_path, part("finds_no_gpu"), part("works"))


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *more: None if name in ('pydantic', 'torch') else find(name, *more); "
        "from benchmarks.lease.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "need torch, pydantic" in done.stderr
    assert "-m pip install torch pydantic" in done.stderr


# --- results ----------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    emit = Emit(tmp_path, "part")
    emit("one", 1.5, "s", ok=True)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"part": "part", "na')
    write(tmp_path, Result("part", "two", value=float("nan")))
    found, end = read(tmp_path)
    assert [(r.name, r.value) for r in found] == [("one", 1.5), ("two", "nan")]
    assert read(tmp_path, end) == ([], end)


def test_an_exception_is_the_result_of_a_check_unless_the_device_is_broken(tmp_path: Path) -> None:
    emit = Emit(tmp_path, "part")
    with emit.trying("one"):
        raise ValueError("first\nlast")
    with pytest.raises(RuntimeError), emit.trying("two"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    found, _ = read(tmp_path)
    assert [r.more["error"] for r in found] == [
        "ValueError: last",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    ]


def event(name: str, category: str, begin: float, length: float) -> dict[str, object]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": length}


def test_a_trace_says_how_long_the_device_idles_and_who_waits_for_it() -> None:
    events = [
        event(trace.MARK, "user_annotation", 0, 100),
        event("mm", "kernel", 10, 20),
        event("add", "kernel", 20, 20),
        event("Memcpy HtoD", "gpu_memcpy", 60, 10),
        event("norm", "kernel", 90, 20),
        event("cudaStreamSynchronize", "cuda_runtime", 50, 5),
        event("cudaDeviceSynchronize", "cuda_runtime", 150, 5),
        {"ph": "i", "name": "instant", "ts": 3},
    ]
    found = trace.of_events(json.loads(json.dumps(events)))
    assert found == trace.Traced(0.4, 3, 1, 1, ("cudaStreamSynchronize",), 100.0)
    with pytest.raises(ValueError, match="CUPTI"):
        trace.of_events(events[:1])
