"""A check of all ranks before training: are they alike, and is none of them, nor its disk or link, slow?

Each rank measures itself for a few seconds: matmuls, copies in memory, a file with fsync. Neighbours send to each
other, first those with even numbers, then the others. The first rank asks each what time it is, and takes the middle of
question and answer (Cristian, 1989).
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
from rich.table import Table

from zgraph.errors import UsageError
from zgraph.runtime.clock import Clock
from zgraph.version import package_versions

SLOW, SLOW_LINK, LATE_S = 0.8, 0.5, 1.0
"""Shares of the median below which a rank, and its disk or link, count as slow; and clocks that are off by this."""

SIZE, SIZE_ON_DEVICE, COPY_BYTES, FILE_BYTES, SENT_BYTES = 512, 4096, 1 << 26, 1 << 26, 1 << 24
ROUNDS = 5

PACKAGES = ("torch", "triton", "numpy", "transformers")


@dataclass(frozen=True)
class Found:
    """Measurements of one rank.

    Args:
        rank: its number.
        host: the name of its host.
        device: what it computes on.
        versions: of Python and packages; empty text for those that are not installed.
        matmul_flops: FLOP a second of a matmul, fp32 on processors and bf16 on GPUs.
        memory_bytes_per_s: bytes read and written a second by a copy.
        disk_bytes_per_s: bytes written a second, with fsync, to the folder.
        sent_bytes_per_s: bytes a second to the next rank; 0 where there is one rank.
        late_s: how far its clock is behind the first rank's, in seconds.
    """

    rank: int
    host: str
    device: str
    versions: Mapping[str, str]
    matmul_flops: float
    memory_bytes_per_s: float
    disk_bytes_per_s: float
    sent_bytes_per_s: float = 0.0
    late_s: float = 0.0


@dataclass(frozen=True)
class Checkup:
    """All ranks, side by side. Prints as a table with what is wrong below.

    Args:
        ranks: of each what it found, in order.
    """

    ranks: tuple[Found, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems, one sentence each; empty if there are none."""
        return (*self._unlike(), *self._slow(), *self._late())

    def _unlike(self) -> list[str]:
        said = []
        for name in dict.fromkeys(name for found in self.ranks for name in found.versions):
            of = {found.rank: found.versions.get(name, "") for found in self.ranks}
            usual, _ = Counter(of.values()).most_common(1)[0]
            for other in sorted({version for version in of.values() if version != usual}):
                ranks = [rank for rank, version in of.items() if version == other]
                said.append(f"{name} is {other or 'missing'} on {_listed(ranks)}, and {usual or 'missing'} elsewhere")
        devices = Counter(found.device for found in self.ranks)
        if len(devices) > 1:
            said.append("devices differ: " + ", ".join(f"{count} x {name}" for name, count in devices.most_common()))
        return said

    def _slow(self) -> list[str]:
        rows: tuple[tuple[str, str, float], ...] = (
            ("matmul_flops", "computes", SLOW),
            ("memory_bytes_per_s", "copies memory", SLOW),
            ("disk_bytes_per_s", "writes to disk", SLOW_LINK),
            ("sent_bytes_per_s", "sends to the next rank", SLOW_LINK),
        )
        said = []
        for key, does, least in rows:
            usual = median(getattr(found, key) for found in self.ranks)
            for found in self.ranks:
                if (has := getattr(found, key)) < least * usual:
                    said.append(
                        f"rank {found.rank} ({found.host}) {does} at {has / usual:.2f} of the median rank's rate"
                    )
        return said

    def _late(self) -> list[str]:
        return [
            f"the clock of rank {found.rank} ({found.host}) is {abs(found.late_s):,.1f} s "
            f"{'behind' if found.late_s > 0 else 'ahead of'} the first rank's"
            for found in self.ranks
            if abs(found.late_s) > LATE_S
        ]

    def table(self) -> Table:
        """A row for each rank."""
        table = Table(*("rank", "host", "device", "GFLOP/s", "memory GB/s", "disk GB/s", "link GB/s", "clock ms"))
        for found in self.ranks:
            rates = (found.matmul_flops, found.memory_bytes_per_s, found.disk_bytes_per_s, found.sent_bytes_per_s)
            shown = [f"{rate / 1e9:,.2f}" for rate in rates]
            table.add_row(str(found.rank), found.host, found.device, *shown, f"{1e3 * found.late_s:+,.1f}")
        return table


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def check_ranks(folder: Path, group: dist.ProcessGroup | None = None) -> Checkup:
    """Measure all ranks of a group. All of them call it; without a process group there is one.

    Args:
        folder: where checkpoints are to go, for the speed of its disk.
        group: of the ranks; by default all.

    Raises:
        UsageError: the folder cannot be written to.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    has_peers = dist.is_initialized() and dist.get_world_size(group) > 1
    rank = dist.get_rank(group) if has_peers else 0
    found = Found(
        rank,
        socket.gethostname(),
        torch.cuda.get_device_name() if on_gpu else platform.machine(),
        versions(),
        *_rates(device),
        _disk(folder),
        _link(device, group) if has_peers else 0.0,
        _late_s(group, device) if has_peers else 0.0,
    )
    if not has_peers:
        return Checkup((found,))
    every: list[Found] = [found] * dist.get_world_size(group)
    dist.all_gather_object(every, found, group=group)
    return Checkup(tuple(every))


def versions() -> dict[str, str]:
    """Versions of what all ranks must have alike."""
    return package_versions(PACKAGES, missing="")


def _rates(device: torch.device) -> tuple[float, float]:
    clock = Clock(device, is_cold=False)
    size, dtype = (SIZE_ON_DEVICE, torch.bfloat16) if clock.on_device else (SIZE, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / _seconds(clock, partial(torch.matmul, a, a))
    return flops, 2 * COPY_BYTES / _seconds(clock, partial(target.copy_, source))


def _seconds(clock: Clock, run: Callable[[], object]) -> float:
    return max(median(clock.seconds(run, ROUNDS + 1)[1:]), 1e-9)


def _disk(folder: Path) -> float:
    data = os.urandom(1 << 20)
    try:
        with TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(FILE_BYTES // len(data)):
                file.write(data)
            os.fsync(file.fileno())
            return FILE_BYTES / max(time.perf_counter() - began, 1e-9)
    except OSError as error:
        raise UsageError(f"--folder {folder}: {error}") from None


def _link(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Bytes a second to the next rank, the others of the same parity sending meanwhile."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    sent, taken = (torch.zeros(SENT_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    taking = [0.0]
    for parity in (0, 1) if count % 2 == 0 else (0, 1, 2):
        sends = _turn(rank, count) == parity
        takes = _turn((rank - 1) % count, count) == parity
        for number in range(ROUNDS):
            dist.barrier(group)
            if takes:
                dist.recv(taken, group=group, group_src=(rank - 1) % count)
            if sends:
                began = time.perf_counter()
                dist.send(sent, group=group, group_dst=(rank + 1) % count)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taking += [time.perf_counter() - began] if number else []
    return SENT_BYTES / max(median(taking[1:]), 1e-9)


def _turn(rank: int, count: int) -> int:
    """When a rank sends: even ones first, then the others; the last of an odd number by itself."""
    return 2 if count % 2 and rank == count - 1 else rank % 2


def _late_s(group: dist.ProcessGroup | None, device: torch.device) -> float:
    """How far this rank's clock is behind the first rank's."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    told = torch.zeros(1, dtype=torch.float64, device=device)
    found = 0.0
    for other in range(1, count):
        if rank not in (0, other):
            continue
        for _ in range(2):  # the first connects
            if rank == 0:
                dist.recv(told, group=group, group_src=other)
                told.item()  # on a GPU, the host goes on before the question is there
                told.fill_(time.time())
                dist.send(told, group=group, group_dst=other)
            else:
                asked = time.time()
                dist.send(told, group=group, group_dst=0)
                dist.recv(told, group=group, group_src=0)
                found = float(told) - (asked + time.time()) / 2
    return found
