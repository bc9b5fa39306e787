"""A check of all ranks: each sends to the next, and tells the time."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed.device_mesh import DeviceMesh

from tests.deep import deep
from zgraph.compiler import checkup

from .pool import Pool


def checked(mesh: DeviceMesh, folder: Path) -> tuple[checkup.Checkup, list[str]]:
    rank = mesh.get_rank()
    now, versions = time.time, checkup.versions()
    small = patch.multiple(checkup, COPY_BYTES=1 << 20, FILE_BYTES=1 << 20, SENT_BYTES=1 << 16, SIZE=32)
    clock = patch.object(checkup.time, "time", lambda: now() - 30 * (rank == 1))
    other = patch.object(checkup, "versions", lambda: versions | ({"torch": "1.0"} if rank == 1 else {}))
    with small, clock, other:
        found = checkup.check_ranks(folder, mesh.get_group())
    return found, [p for p in found.problems if "rate" not in p]


@pytest.mark.parametrize("num_ranks", [3, deep(2), deep(4)])
def test_all_ranks_are_checked(pool: Pool, tmp_path: Path, num_ranks: int) -> None:
    answers = pool.run(checked, num_ranks, tmp_path)
    for found, problems in answers:
        assert found == answers[0][0]
        assert [one.rank for one in found.ranks] == list(range(num_ranks))
        assert all(one.sent_bytes_per_s > 1e3 for one in found.ranks)
        assert abs(found.ranks[1].late_s - 30) < 5
        assert all(abs(one.late_s) < 5 for one in found.ranks if one.rank != 1)
        assert any(p.startswith("torch is") for p in problems)
        assert any(p.startswith("the clock of rank 1") for p in problems)
