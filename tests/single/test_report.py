"""The report's memory is what a profiler measures, and it can be printed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zgraph
from small import llama
from tests.peaks import peak_bytes
from zgraph.compiler.report import Report, alike, mebibytes

from .nets import Mlp, built, rows


def measured_peak_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """The most bytes alive at once, above what was alive before, in a forward and a backward."""
    return peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward())


@pytest.mark.parametrize(("num_rows", "length"), [(2, 32), (4, 128)], ids=["weights-rule", "activations-rule"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_predicted_peak_is_the_measured_one(stage: int, num_rows: int, length: int) -> None:
    model = zgraph.compile(built(lambda: llama(128, 4, 1000)), stage=stage)
    ids = torch.randint(1000, (num_rows, length))
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    measured = measured_peak_bytes(model, ids)
    assert zgraph.report(model).step_peak_bytes == pytest.approx(measured, rel=0.05)


def report_of(stage: int) -> Report:
    model = zgraph.compile(built(Mlp), stage=stage)
    model(*rows(0)).backward()
    with torch.no_grad():
        model(*rows(0))
    return zgraph.report(model)


@pytest.mark.parametrize("stage", range(4))
def test_the_report_prints(stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(stage)
    print(report)
    text = capsys.readouterr().out
    for word in ("Mlp on 1 rank", f"partition(stage={stage})", "training graph", "inference graph", "peak above rest"):
        assert word in text


def test_the_reports_numbers() -> None:
    report = report_of(3)
    num_bytes = 4 * sum(p.numel() for p in Mlp().parameters())
    assert report.num_ranks == 1
    assert report.whole_bytes == report.rest_bytes == num_bytes
    assert report.buffer_bytes == 0
    assert report.sent_bytes == 0
    assert [e.kind for e in report.entries] == ["training", "inference"]


def test_a_report_before_the_first_call_says_so() -> None:
    assert "Nothing captured yet" in str(zgraph.report(zgraph.compile(built(Mlp))))


def test_graphs_that_differ_in_sizes_alone_are_one_table() -> None:
    """A model that generates is captured once for each length."""
    model = zgraph.compile(built(lambda: llama(32, 1, 61)), dynamic=False)
    with torch.no_grad():
        for length in (4, 5, 6, 7):
            model(input_ids=torch.ones(1, length, dtype=torch.int64))
    ids = torch.ones(1, 4, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    report = zgraph.report(model)
    text = str(report)
    assert [len(group) for group in alike(report.entries)] == [4, 1]
    assert text.count("inference graph") == text.count("training graph") == 1
    said = " ".join(text.split())
    assert "and 3 more like it, LlamaForCausalLM-1 to LlamaForCausalLM-3, of sizes 4, 5, 6, 7: peak above rest" in said
    peaks = [e.memory.peak.total_bytes for e in report.entries[:4]]
    assert f"{mebibytes(min(peaks))} to {mebibytes(max(peaks))}" in said
