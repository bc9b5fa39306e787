"""Copies of parameters for codes of what changed: kept by bucket, moved to other buckets, and given up once written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from zgraph.ir import DType
from zgraph.ir.codecs import Delta, Difference
from zgraph.runtime.last_copies import LastCopies

NUM_RANKS = 2
SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2)}


def copies() -> LastCopies:
    slots: dict[str, Any] = {
        name: SimpleNamespace(
            placeholder=torch.empty(shape, dtype=torch.bfloat16), is_sharded=True, stage=None if name != "c" else 3
        )
        for name, shape in SHAPES.items()
    }
    return LastCopies(SimpleNamespace(store=SimpleNamespace(slots=slots, default_stage=2), num_shards=NUM_RANKS))


def rows(numel: int, first: float) -> torch.Tensor:
    return (first + torch.arange(NUM_RANKS * numel)).view(NUM_RANKS, numel).bfloat16()


def test_other_buckets_have_the_same_numbers() -> None:
    kept = copies()
    assert kept.of(("a",), DType.bf16) is None
    kept.keep(("a", "b"), DType.bf16, both := rows(8 + 3, 0.0))  # 6 numbers, up to a multiple of 16 bytes, and 3
    kept.keep(("c",), DType.bf16, alone := rows(2, 50.0))
    assert kept.of(("a",), DType.f16) is None
    found = kept.of(("c", "b"), DType.bf16)
    assert found is not None
    assert found.number == 3
    assert torch.equal(found.rows[:, :2], alone)
    assert torch.equal(found.rows[:, 8:11], both[:, 8:])
    assert kept.of(("c", "b"), DType.bf16) is found
    assert kept.num_bytes == 2 * NUM_RANKS * (11 + 11), "a is in its old bucket still, and c in its new one alone"


def test_they_move_to_other_buckets_in_inference_mode() -> None:
    kept = copies()
    kept.keep(("a", "b"), DType.bf16, rows(8 + 3, 0.0))
    with torch.inference_mode():
        found = kept.of(("b",), DType.bf16)
        assert found is not None
        assert kept.of(("b",), DType.bf16) is found
    assert not found.rows.is_inference()
    assert found.is_intact


def test_one_that_was_written_to_is_given_up() -> None:
    kept = copies()
    kept.keep(("a",), DType.bf16, made := rows(6, 0.0))
    assert kept.of(("a",), DType.bf16) is not None
    made.view(-1)[:12].view(4, 3)[1] += 1  # as what is computed with shares its memory
    assert kept.of(("a",), DType.bf16) is None
    kept.keep(("a",), DType.bf16, rows(6, 0.0))
    kept.forget()
    assert kept.of(("a",), DType.bf16) is None


def test_the_most_are_of_the_stages_that_keep_them() -> None:
    assert copies().most_bytes(Delta.dtypes, with_own=False) == 2 * NUM_RANKS * (6 + 3)
    assert copies().most_bytes(Delta.dtypes, with_own=True) == 2 * (NUM_RANKS + 1) * (6 + 3)
    assert copies().most_bytes(Difference.dtypes, with_own=False) >= 2 * NUM_RANKS * (6 + 3)
