"""Layouts are chosen by the plans of all that are tried, and the choice is told."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.distributed.tensor_zoo import WORDS, mixtral, qwen3_moe
from zgraph.errors import PlacementError, UsageError
from zgraph.estimate.layouts import _refuses_axes, laid_out
from zgraph.estimate.training_plan import TrainingPlan
from zgraph.options.experts import experts_of
from zgraph.options.settings import Options

IDS = torch.zeros(2, 16, dtype=torch.int64, device="meta")


def chosen(model: nn.Module) -> TrainingPlan:
    return zgraph.plan(
        model, hardware="h100", num_ranks=2, stage=3, kernels="aten", parallel="auto", input_ids=IDS, labels=IDS
    )


def test_the_layout_is_the_one_that_trains_on_the_most_in_a_second() -> None:
    with torch.device("meta"):
        model = small.llama(32, 1, WORDS)
    found = chosen(model)
    assert found.layouts.startswith("layout: ")
    speeds = {}
    for sizes in ({}, {"tensor_parallel": 2}, {"context_parallel": 2}):
        plan = zgraph.plan(
            model, hardware="h100", num_ranks=2, stage=3, kernels="aten", input_ids=IDS, labels=IDS, **sizes
        )
        assert plan.best is not None
        speeds[plan.tensor_parallel, plan.context_parallel] = 1e6 * IDS.numel() * 2 / plan.together / plan.best.total_us
    assert speeds[found.tensor_parallel, found.context_parallel] == max(speeds.values())
    for speed in speeds.values():
        assert f"{speed:,.0f} tokens/s" in found.layouts


def test_experts_are_shared_where_a_model_has_them() -> None:
    with torch.device("meta"):
        model = qwen3_moe()
    found = chosen(model)
    assert "expert_parallel=2 at stage 3" in found.layouts
    assert "tensor_parallel" not in found.layouts
    again = zgraph.plan(
        model,
        hardware="h100",
        num_ranks=2,
        stage=3,
        kernels="aten",
        expert_parallel=2,
        input_ids=IDS,
        labels=IDS,
    )
    assert again.best is not None
    assert again.num_batches == 2
    assert f"expert_parallel=2 at stage 3 {1e6 * 2 * IDS.numel() / again.best.total_us:,.0f} tokens/s" in found.layouts


def test_a_number_of_experts_that_does_not_divide_is_told_of() -> None:
    with torch.device("meta"):
        model = mixtral()
    found = chosen(model)
    assert "has 3 experts, which do not divide over 2 ranks" in found.layouts
    assert found.expert_parallel == 1


def test_a_plan_of_ones_own_model_hands_its_placements_on() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.SiLU(), nn.Linear(256, 64, bias=False))
    x = torch.empty(512, 64, device="meta")
    options: dict[str, Any] = {"hardware": "h100", "num_ranks": 2, "stage": 1, "kernels": "aten"}
    searched = zgraph.plan(model, x, tensor_parallel=2, **options)
    assert dict(searched.placements) == dict(
        zgraph.search_placements(model, x, tensor_parallel=2, hardware="h100", num_ranks=2)
    )
    given: dict[str, Any] = {"0.weight": "S0", "2.weight": "S1"}
    stated = zgraph.plan(model, x, tensor_parallel=2, placements=given, **options)
    worse = zgraph.plan(model, x, tensor_parallel=2, placements={"0.weight": "S1"}, **options)
    assert stated.placements == given
    assert stated.stages[0].rest_bytes["parameters"] < worse.stages[0].rest_bytes["parameters"]
    with (
        patch("torch.distributed.is_initialized", return_value=True),
        patch("torch.distributed.get_world_size", return_value=2),
    ):
        found, _ = laid_out(model, stated, {})
    assert found["placements"] == given
    assert found["tensor_parallel"] == 2


def test_placements_of_a_plan_that_cannot_be() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False)), torch.empty(2, 4)
    with pytest.raises(UsageError, match="give tensor_parallel= too"):
        zgraph.plan(model, x, placements={"0.weight": "S0"})
    with pytest.raises(UsageError, match="no parameter of Sequential is called up"):
        zgraph.plan(model, x, placements={"up": "S0"}, tensor_parallel=2)
    with pytest.raises(UsageError, match=r"leave placements= out, or give the sizes"):
        zgraph.plan(model, x, placements={"0.weight": "S0"}, parallel="auto")
    with pytest.raises(PlacementError, match=r"0\.experts is a list of modules"):
        experts_of(nn.Sequential(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])})), 2)


@pytest.mark.parametrize(
    ("option", "refused"),
    [
        ({}, False),
        ({"fullgraph": False}, True),
        ({"dynamic": True}, True),
        ({"kernels": "triton"}, True),
        ({"offload": "optimizer"}, True),
        ({"compress": "q8"}, True),
    ],
)
def test_options_that_an_axis_refuses_leave_none_to_try(option: Options, refused: bool) -> None:
    assert _refuses_axes(option) is refused


def test_one_rank_has_nothing_to_choose() -> None:
    model = zgraph.compile(small.llama(32, 1, WORDS), parallel="auto", stage=1, kernels="aten")
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    assert "layout: none together at stage 1" in str(zgraph.report(model))


def test_what_it_chooses_is_not_given() -> None:
    model = small.llama(32, 1, WORDS)
    with pytest.raises(UsageError, match=r"leave expert_parallel=, sequence_parallel= out, or parallel="):
        zgraph.compile(model, parallel="auto", expert_parallel=2, sequence_parallel=True)
    with pytest.raises(UsageError, match='parallel must be "auto" or a plan'):
        zgraph.compile(model, parallel="fast")
    with pytest.raises(UsageError, match="knows no inputs of Linear: plan with your own"):
        zgraph.compile(nn.Linear(2, 2), parallel="auto")
    with pytest.raises(UsageError, match="leave their sizes and mesh= out"):
        zgraph.plan(model, IDS, parallel="auto", tensor_parallel=2)
    with pytest.raises(UsageError, match="leave compute= and compress= out"):
        zgraph.plan(model, IDS, parallel="auto", compress="q8")
