"""What a check of all ranks says of ranks that are not as the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zgraph.compiler.checkup import Checkup, Found, check_ranks
from zgraph.errors import UsageError

ONE = Found(0, "host", "H100", {"torch": "2.13", "triton": "3.7"}, 1e12, 1e11, 1e9, 1e10)
RANKS = tuple(replace(ONE, rank=rank, host=f"host{rank // 2}") for rank in range(6))


def problems(rank: int, **changed: object) -> tuple[str, ...]:
    return Checkup(tuple(replace(r, **changed) if r.rank == rank else r for r in RANKS)).problems  # type: ignore[arg-type]


def test_ranks_that_are_alike() -> None:
    assert Checkup(RANKS).problems == ()
    assert problems(3, matmul_flops=0.81e12, disk_bytes_per_s=0.51e9, late_s=0.9) == ()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"versions": {"torch": "2.12", "triton": "3.7"}}, "torch is 2.12 on rank 3, and 2.13 elsewhere"),
        ({"versions": {"torch": "2.13", "triton": ""}}, "triton is missing on rank 3, and 3.7 elsewhere"),
        ({"device": "A100"}, "devices differ: 5 x H100, 1 x A100"),
        ({"matmul_flops": 0.79e12}, "rank 3 (host1) computes at 0.79 of the median rank's rate"),
        ({"memory_bytes_per_s": 5e10}, "rank 3 (host1) copies memory at 0.50 of the median rank's rate"),
        ({"disk_bytes_per_s": 4e8}, "rank 3 (host1) writes to disk at 0.40 of the median rank's rate"),
        ({"sent_bytes_per_s": 1e9}, "rank 3 (host1) sends to the next rank at 0.10 of the median rank's rate"),
        ({"late_s": 2.0}, "the clock of rank 3 (host1) is 2.0 s behind the first rank's"),
        ({"late_s": -90.0}, "the clock of rank 3 (host1) is 90.0 s ahead of the first rank's"),
    ],
)
def test_a_rank_that_is_not_as_the_others(changed: dict[str, object], said: str) -> None:
    assert problems(3, **changed) == (said,)


def test_one_rank_measures_itself(tmp_path) -> None:
    (found,) = check_ranks(tmp_path).ranks
    assert min(found.matmul_flops, found.memory_bytes_per_s, found.disk_bytes_per_s) > 1e6
    assert found.sent_bytes_per_s == found.late_s == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="--folder"):
        check_ranks(tmp_path / "gone")
