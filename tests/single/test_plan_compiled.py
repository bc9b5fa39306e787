"""What `zgraph.plan` says is what `zgraph.compile` reports on the same machine: bytes to the allocation, and time."""

import pytest
import torch

import small
import zgraph
from benchmarks.peak_models import MODELS
from tests.deep import deep

IDS = torch.zeros(2, 64, dtype=torch.int64)
BATCH = {"input_ids": IDS, "labels": IDS}


def llama():
    return small.llama(num_layers=5)


def checkpointed():
    model = small.llama(num_layers=5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def gpt2():
    return small.gpt2(num_layers=5)


@pytest.mark.parametrize("build", [checkpointed, deep(llama), deep(gpt2)])
def test_plan_is_what_compile_reports(build):
    torch.compiler.reset()
    with torch.device("meta"):
        abstract = build().train()
    (planned,) = zgraph.plan(abstract, **BATCH, hardware="cpu", num_ranks=1, stage=0).stages
    model = zgraph.compile(build().train(), stage=0, hardware="cpu")
    model(**BATCH).loss.backward()
    report = zgraph.report(model)
    assert planned.total_bytes == pytest.approx(report.peak_bytes, rel=0.002)
    timeline = report.entries[0].timeline
    assert planned.step_us == pytest.approx(timeline.step_us, rel=0.01)
    assert planned.exposed_us == pytest.approx(timeline.exposed_us, abs=1)
    assert (planned.again_share > 0.1) == (build is checkpointed)
    assert planned.time.low < planned.total_us < planned.time.high


ZOO = [name for name in MODELS if name != "ConvNeXt"]


@pytest.mark.parametrize("name", ["ConvNeXt", *(deep(name) for name in ZOO)])
def test_plan_is_what_compile_reports_for_the_zoo(name):
    """Bytes with what ops take for themselves, which both measure; and time."""
    build, batch = MODELS[name]
    given = batch()
    with torch.device("meta"):
        abstract = build().train()
    (planned,) = zgraph.plan(abstract, **given, hardware="cpu", num_ranks=1, stage=0).stages
    model = zgraph.compile(build().train(), stage=0, hardware="cpu")
    model(**given)["loss"].backward()
    report = zgraph.report(model)
    assert planned.total_bytes == pytest.approx(report.peak_bytes, rel=0.002)
    assert planned.step_us == pytest.approx(report.entries[0].timeline.step_us, rel=0.01)


def test_regions_under_checkpoint_are_planned_again():
    with torch.device("meta"):
        plain, marked = llama().train(), checkpointed().train()
    first, second = (zgraph.plan(m, **BATCH, hardware="2x8-h100", stage=3).stages[0] for m in (plain, marked))
    assert second.peak_bytes["activations"] < 0.6 * first.peak_bytes["activations"]
    assert second.again_share > 0.1 > first.again_share
