"""Saving and loading optimizer state, beside torch.distributed.checkpoint and dd: python -m benchmarks.checkpoints

Four ranks over gloo on one host, each with its rows of AdamW's master, two moments and a count for every parameter. All
ways write and read the same bytes in one folder, in turns; what a save has left in the page cache is dropped before it
is read. dd goes past the page cache. Beside them the time to index a checkpoint of many simulated ranks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import zgraph
from benchmarks.control_plane import keep_store
from benchmarks.results import write
from zgraph.engine.checkpoint.index import Entry, Index
from zgraph.engine.checkpoint.layout import Layout
from zgraph.engine.checkpoint.ranks import Ranks
from zgraph.engine.checkpoint.shards import read_shards, write_shards
from zgraph.engine.checkpoint.storage import Reader, Writer
from zgraph.optim.runs import local

COLUMNS = 1024
KEYS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def many_ranks(num_ranks: int, num_tensors: int = 1000) -> Index:
    """The index of a checkpoint of ranks on hosts of 8, with tensors cut over both axes, in blocks, and not at all."""
    layouts = (
        Layout(mesh=(num_ranks // 8, 8), cuts=((0, 1), (1, 1))),
        Layout(mesh=(8, num_ranks // 8), cuts=((0, 2), (0, 1))),
        Layout(mesh=(num_ranks,), cuts=(None,)),
    )
    shapes = ((8192, 8192), (65536, 512), (8192,))
    tensors = {f"model.{i}": Entry(dtype="float32", shape=shapes[i % 3], layout=i % 3) for i in range(num_tensors)}
    made = Index(num_ranks=num_ranks, layouts=layouts, tensors=tensors)
    return made.model_copy(update={"checksum": made.computed()})


def index_s(num_ranks: int) -> float:
    """Seconds to make an index, to write its text, to read that again, and to find what a rank writes."""
    began = time.perf_counter()
    found = Index.model_validate_json(many_ranks(num_ranks).model_dump_json())
    assert not found.problem()
    assert found.written_by(num_ranks - 1)
    return time.perf_counter() - began


def state(num_bytes: int, num_tensors: int) -> dict[str, torch.Tensor]:
    """Tensors as an engine's checkpoint has them, sharded by rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = num_bytes // (len(KEYS) * num_tensors * COLUMNS * 4 * mesh.size())
    found: dict[str, torch.Tensor] = {}
    for number in range(num_tensors):
        for key in KEYS:
            found[f"{key}.w{number}"] = DTensor.from_local(torch.randn(rows, COLUMNS), mesh, [Shard(0)])
        found[f"optimizer.step.w{number}"] = torch.tensor(3.0)
    return found


def measure(rank: int, num_ranks: int, num_bytes: int, num_rounds: int, port: int, folder: Path, answers: Any) -> None:
    """One rank: seconds of each way in each round, of the slowest rank."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "ZGRAPH_LOGS": "none"}
    zgraph.init_distributed("gloo")
    tensors, ranks = state(num_bytes, num_tensors=8), Ranks(dist.group.WORLD)
    own = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors.values())
    expected = {name: crc(t) for name, t in tensors.items() if isinstance(t, DTensor)}
    assert ranks.group is not None

    def save() -> None:
        (folder / "zgraph").mkdir(exist_ok=True)
        write_shards(tensors, Writer(folder / "zgraph", rank, {}, lambda: None, lambda: None), ranks)

    def load() -> None:
        reader = Reader(folder / "zgraph")
        ranks.together(lambda: reader.check(rank, num_ranks))
        read_shards(tensors, reader, ranks)

    def dd(*arguments: str) -> None:
        command = ["dd", "bs=4M", f"count={max(own >> 22, 1)}", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    file = folder / f"dd_{rank}"
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "zgraph": (save, load),
        "torch": (
            lambda: dcp.save(tensors, checkpoint_id=folder / "torch"),
            lambda: dcp.load(tensors, checkpoint_id=folder / "torch"),
        ),
        "dd": (
            lambda: dd("if=/dev/zero", f"of={file}", "oflag=direct", "conv=fsync"),
            lambda: dd(f"if={file}", "of=/dev/null", "iflag=direct"),
        ),
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(num_rounds):
        for name, (write_it, read_it) in ways.items():
            if rank == 0:
                shutil.rmtree(folder / name, ignore_errors=True)
            seconds.setdefault(f"{name} save", []).append(timed(write_it))
            drop_caches(folder)
            for tensor in tensors.values() if name != "dd" else ():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            dist.barrier()
            seconds.setdefault(f"{name} load", []).append(timed(read_it))
            for key, before in expected.items():
                assert crc(tensors[key]) == before, f"{name} has loaded another {key}"
    if rank == 0:
        answers.send({"num_bytes": own * num_ranks, "seconds": seconds})
    dist.barrier()
    dist.destroy_process_group()


def crc(tensor: torch.Tensor) -> int:
    """A checksum of this rank's numbers: a copy of them would take as much memory again."""
    return zlib.crc32(local(tensor).numpy().data)


def timed(action: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def drop_caches(folder: Path) -> None:
    """Have what lies in the page cache of these files forgotten."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main(
    gb: Annotated[float, typer.Option(min=0.01, help="Size of the state, in GB.")] = 0.2,
    num_ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes that share it.")] = 4,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each.")] = 3,
    simulated: Annotated[int, typer.Option(min=64, help="Simulated ranks of the index.")] = 4096,
    folder: Annotated[Path, typer.Option(help="Where the files go, in a folder that is removed.")] = Path("/tmp"),
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time all ways in turns, and print the medians."""
    home = Path(tempfile.mkdtemp(prefix="zgraph-checkpoints-", dir=folder))
    context = get_context("fork")  # what is imported is imported once
    told, keeps = context.Pipe()
    keeper = context.Process(target=keep_store, args=(keeps,), daemon=True)
    keeper.start()
    port = told.recv()
    ours, theirs = context.Pipe()
    workers = [
        context.Process(target=measure, args=(rank, num_ranks, int(gb * 1e9), num_rounds, port, home, theirs))
        for rank in range(num_ranks)
    ]
    try:
        for worker in workers:
            worker.start()
        while not ours.poll(1.0):
            if any(worker.exitcode for worker in workers):
                raise SystemExit("a rank has failed: see above")
        found = ours.recv()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.kill()
        keeper.kill()
        shutil.rmtree(home, ignore_errors=True)
    rates = {name: round(found["num_bytes"] / median(times) / 1e6, 1) for name, times in found["seconds"].items()}
    table = Table("", "save (MB/s)", "load (MB/s)")
    for name in ("zgraph", "torch", "dd"):
        table.add_row(name, f"{rates[f'{name} save']:,.0f}", f"{rates[f'{name} load']:,.0f}")
    console = Console()
    console.print(table)
    indexed = round(min(index_s(simulated) for _ in range(3)), 4)
    console.print(f"{simulated} ranks indexed in {indexed:.3f} s")
    write(
        json_file,
        num_bytes=found["num_bytes"],
        ranks=num_ranks,
        mb_per_s=rates,
        index={"ranks": simulated, "tensors": 1000, "seconds": indexed},
    )


if __name__ == "__main__":
    typer.run(main)
