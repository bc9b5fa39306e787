"""Memory that a GPU's allocator reserves for a step, beside what is allocated."""

import pytest
import torch
from torch import nn

import zgraph
from zgraph.cost.allocator import MIB
from zgraph.cost.reserved import CONTEXT_BYTES, NCCL_BYTES, beside_bytes, footprint

WIDTH = 1536


@pytest.fixture(scope="module")
def entry():
    model = zgraph.compile(
        nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3))), hardware="h100"
    )
    model(torch.randn(512, WIDTH)).sum().backward()
    return zgraph.report(model).entries[0], model


def test_more_is_reserved_than_allocated(entry):
    found, _ = entry
    sizes = {
        expandable: footprint(found.plan, found.hints, 8, expandable=expandable, library_bytes=32 * MIB)
        for expandable in (False, True)
    }
    for space in sizes.values():
        assert space.reserved_bytes >= space.allocated_bytes > found.memory.peak.total_bytes
        assert space.device_bytes - space.reserved_bytes == CONTEXT_BYTES + NCCL_BYTES == beside_bytes(8)
    assert sizes[True].allocated_bytes < sizes[False].allocated_bytes, "what is left of a block is not always another"
    assert sizes[True].reserved_bytes - sizes[True].allocated_bytes < 24 * MIB, "one page of each pool"
    assert beside_bytes(1) == CONTEXT_BYTES


def test_what_is_allocated_is_what_the_step_and_rest_take(entry):
    """Parameters, two moments, and the larger of the step and the update, which has gradients and a copy of masters."""
    found, model = entry
    whole = 4 * sum(p.numel() for p in model.parameters())
    space = footprint(found.plan, found.hints, 1, expandable=False)
    expected = 3 * whole + max(found.memory.peak.total_bytes, 2 * whole)
    assert space.allocated_bytes == pytest.approx(expected, rel=0.02)


def test_a_report_and_a_plan_tell_both(entry, tmp_path):
    _, model = entry
    report = zgraph.report(model)
    assert report.footprint is not None
    assert "reserved for it by torch's allocator" in str(report)
    with torch.device("meta"):
        abstract = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)))
    plan = zgraph.plan(abstract, torch.zeros(64, 4096), hardware="8x8-h100", stage=3)
    (stage,) = plan.stages
    assert stage.reserved.value >= stage.total_bytes
    assert stage.reserved.low < stage.reserved.value < stage.reserved.high
    assert "reserved by torch's allocator: stage 3" in str(plan)


def test_processors_reserve_nothing():
    plan = zgraph.plan(nn.Linear(8, 8), torch.zeros(2, 8), hardware="cpu", num_ranks=1, stage=0)
    assert plan.stages[0].reserved is None
    assert plan.reserved == ""
    model = zgraph.compile(nn.Linear(8, 8))
    model(torch.zeros(2, 8)).sum().backward()
    assert zgraph.report(model).footprint is None


def test_a_plan_fits_only_if_what_is_reserved_does(monkeypatch):
    with torch.device("meta"):
        abstract = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)))
    x = torch.zeros(64, 4096)
    (fits,) = zgraph.plan(abstract, x, hardware="1x8-h100", stage=3, offload=None).stages
    assert fits.fits
    monkeypatch.setattr("zgraph.estimate.planners.beside_bytes", lambda count: 80 << 30)  # a driver that takes it all
    (full,) = zgraph.plan(abstract, x, hardware="1x8-h100", stage=3, offload=None).stages
    assert not full.fits
    (told,) = zgraph.plan(abstract, x, hardware="1x8-h100", stage=3, offload=None, memory_budget="60GiB").stages
    assert told.fits, "a budget in bytes is for what is allocated"
