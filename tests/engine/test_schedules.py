"""Learning rates worked out by hand; and what a scheduler keeps."""

import math

import pytest
import torch
from torch import nn

from zgraph.engine.config.lr_schedules import SCHEDULES, Scheduler
from zgraph.errors import UsageError


def rates(name, params, steps, lr=0.1):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = Scheduler(optimizer, SCHEDULES[name](**params))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "params", "wanted"),
    [
        ("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, [0, 0, 0.025, 0.05, 0.075, 0.1, 0.1]),
        ("WarmupLR", {"warmup_num_steps": 4}, [0, 0, 0.1 * math.log(2) / math.log(4), 0.1 * math.log(3) / math.log(4)]),
        ("WarmupLR", {"warmup_num_steps": 2, "warmup_min_lr": 0.02, "warmup_max_lr": 0.04}, [0.02, 0.02, 0.04, 0.04]),
        (
            "WarmupDecayLR",
            {"warmup_num_steps": 2, "total_num_steps": 6, "warmup_type": "linear", "warmup_max_lr": 0.1},
            [0, 0, 0.05, 0.1, 0.075, 0.05, 0.025, 0, 0],
        ),
        (
            "WarmupCosineLR",
            {"warmup_num_steps": 2, "total_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.0},
            [0, 0, 0.05, 0.05, 0, 0],
        ),
        (
            "LRRangeTest",
            {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2, "lr_range_test_staircase": True},
            [0.01, 0.01, 0.02, 0.02, 0.03],
        ),
        (
            "OneCycle",
            {"cycle_min_lr": 0.0, "cycle_max_lr": 0.2, "cycle_first_step_size": 2},
            [0, 0.1, 0.2, 0.1, 0.0, 0.0],
        ),
    ],
)
def test_rates_worked_out_by_hand(name, params, wanted):
    assert rates(name, params, len(wanted)) == pytest.approx(wanted)


def test_one_cycle_moves_the_momentum_the_other_way():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    keys = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 2, "cycle_max_mom": 0.95}
    scheduler = Scheduler(optimizer, SCHEDULES["OneCycle"](**keys))
    assert scheduler.get_mom() == [(0.95, 0.99)]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    momenta = []
    for _ in range(4):
        scheduler.step()
        momenta.append(optimizer.param_groups[0]["betas"][0])
        assert scheduler.get_mom() == [(momenta[-1], 0.99)]
    assert momenta == pytest.approx([0.875, 0.8, 0.875, 0.95])


def test_a_scheduler_goes_on_where_it_was_saved():
    params = {"warmup_num_steps": 3, "total_num_steps": 9}
    whole = rates("WarmupDecayLR", params, 8)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.5)
    first = Scheduler(torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1), SCHEDULES["WarmupDecayLR"](**params))
    for _ in range(4):
        first.step()
    second = Scheduler(optimizer, SCHEDULES["WarmupDecayLR"](**params))
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == whole[4]
    second.step()
    assert second.get_last_lr() == [whole[5]]


def test_a_rate_for_each_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)])
    Scheduler(optimizer, SCHEDULES["LRRangeTest"](lr_range_test_min_lr=(0.1, 0.2)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    with pytest.raises(UsageError, match="3 rates for 2 groups"):
        Scheduler(optimizer, SCHEDULES["LRRangeTest"](lr_range_test_min_lr=(0.1, 0.2, 0.3)))
