"""Published steps: rows are read, sizes are substituted, and steps are predicted by the path of the product."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.published.conformal import Residual, accuracy, bounds, coverage
from benchmarks.published.models import Sizes, Transformer
from benchmarks.published.rows import FILES, Row, Unread, read
from zgraph import trace
from zgraph.errors import UsageError
from zgraph.estimate.placeholders import with_sizes
from zgraph.ir import print_graph

STEPS, MPT = FILES


def captured(batch, sequence, heads, inner, vocabulary):
    sizes = Sizes(2, 16 * heads, heads, heads, inner, vocabulary, False, sequence, checkpointed="full")
    with torch.device("meta"):
        model = Transformer(sizes)
        tokens, table = torch.zeros(batch, sequence, dtype=torch.int64), torch.zeros(sequence, 16)
    return trace(model, tokens, tokens, table, table, param_dtype="bf16", capability=(8, 0))


def test_a_capture_with_placeholders_is_the_capture_with_the_sizes():
    general = captured(11, 32 * 13, 17, 23, 29)
    found = with_sizes(general, {11: 3, 13: 2, 17: 4, 23: 64, 29: 100})
    assert print_graph(found) == print_graph(captured(3, 64, 4, 64, 100))
    assert print_graph(with_sizes(general, {})) == print_graph(general)


@pytest.mark.parametrize("number", [2, 7, 15, 1])
def test_a_placeholder_is_a_prime_that_no_dim_is(number):
    with pytest.raises(UsageError, match="must be a prime above 7"):
        with_sizes(trace(torch.nn.Linear(4, 4), torch.zeros(2, 4)), {number: 3})


def test_every_published_row_is_read():
    found = [row for path in FILES for row in read(path)]
    assert len(found) > 100
    assert all(isinstance(row, Row) and row.measured_s > 0 for row in found)
    assert len({row.name for row in found}) == len(found)
    by_name = {row.name: row for row in found}
    t2, f1a, q5 = by_name["T2"], by_name["F1a"], by_name["Q5"]
    assert (t2.stage, t2.recomputed, t2.is_fused, t2.reduce_dtype) == (3, "ops", True, "f32")
    assert (f1a.num_copies, f1a.num_ranks, f1a.hardware.num_hosts) == (16, 128, 16)
    assert q5.measured_s == pytest.approx(8 * 2048 / 7350)
    assert q5.memory == (pytest.approx(28.9 * 2**30, abs=1), "reserved")


def changed(tmp_path, path, name, **cells):
    """A file of one row, with some cells changed."""
    with path.open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if name in (r.get("id"), None))
    made = tmp_path / "rows.csv"
    with made.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row | cells)
    return read(made)[0]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"strategy": "DP 8 (TP8 PP1)"}, "parallel in another way than by ZeRO: TP 8"),
        ({"strategy": "ZeRO-3 CPU offload"}, "optimizer runs on the host"),
        ({"gpu": "TPUv4"}, "no profile is that of TPUv4"),
        ({"params": "8e9"}, "are not those of its layers"),
        ({"act_ckpt": "sometimes"}, "recomputation of 'sometimes' is not known"),
        ({"strategy": "FSDP2 + async TP"}, "parallel in another way than by ZeRO: TP"),
        ({"mbs": ""}, "missing, or no number"),
        ({"gpus": "12"}, "12 ranks do not fill hosts of 8"),
        ({"step_s": "", "tok_s_gpu": ""}, "neither seconds, tokens nor FLOP"),
        ({"seq": "1000"}, "no multiple of 32"),
    ],
)
def test_what_cannot_be_expressed_says_why(tmp_path, cells, reason):
    found = changed(tmp_path, STEPS, "X1", **cells)
    assert isinstance(found, Unread)
    assert reason in found.reason


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no rows with the columns of"):
        read(path)


def test_intervals_are_of_families_left_out():
    row = next(found for found in read(STEPS) if isinstance(found, Row))
    residuals = [
        Residual(replace(row, system=family, measured_s=math.exp(shift + n / 100)), 1.0)
        for family, shift in (("a", 0.0), ("b", 0.1), ("c", -0.1), ("d", 0.05))
        for n in range(-5, 6)
    ]
    low, high = bounds(residuals)
    assert low == pytest.approx(math.exp(-0.11), rel=0.02)
    assert high == pytest.approx(math.exp(0.12), rel=0.02)
    assert bounds(residuals, "c")[0] > low
    assert 0.5 < coverage(residuals) < 0.8  # families that differ: fewer than of rows of one kind
    assert accuracy(residuals, "a").max_ranks == row.num_ranks
