"""Plans for hardware that is not here."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.deep import deep
from zgraph.cost import CostTable
from zgraph.cost.hardware import Link, hardware
from zgraph.errors import HardwareError, UsageError
from zgraph.estimate import layer_scaling
from zgraph.estimate import plan as planning
from zgraph.estimate.planners import planner_maker
from zgraph.estimate.shape import Shape
from zgraph.estimate.stage_plan import Planner

IDS = torch.zeros(2, 64, dtype=torch.int64)
_CAPTURES = {}
BATCH = {"input_ids": IDS, "labels": IDS}


def _none(*args):
    return []


def llama(num_layers: int = 5) -> nn.Module:
    with torch.device("meta"):
        return small.llama(num_layers=num_layers)


def t5() -> nn.Module:
    """Two stacks of layers, whose first layers differ from the others."""
    with torch.device("meta"):
        return small.t5(32, 4, 100)


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch):
    """Tests that plan the same model share its capture."""
    capture = planning.capture_samples

    def capture_samples(model, args, kwargs, param_dtype, capability):
        key = type(model), sum(p.numel() for p in model.parameters()), layer_scaling.stacks, capability
        if key not in _CAPTURES:
            _CAPTURES[key] = capture(model, args, kwargs, param_dtype, capability)
        return _CAPTURES[key]

    monkeypatch.setattr(planning, "capture_samples", capture_samples)


@pytest.mark.parametrize(("build", "num_ranks"), [(llama, 8), deep(t5, 1)])
def test_a_model_grown_from_few_layers_is_the_whole_model(build, num_ranks, monkeypatch):
    model = build()
    names = list(model.state_dict())
    scaled = zgraph.plan(model, **BATCH, hardware="8x8-a100-80", num_ranks=num_ranks, stage=[0, 3])
    monkeypatch.setattr(layer_scaling, "stacks", _none)
    whole = zgraph.plan(model, **BATCH, hardware="8x8-a100-80", num_ranks=num_ranks, stage=[0, 3])
    assert list(model.state_dict()) == names
    for a, b in zip(scaled.stages, whole.stages, strict=True):
        assert a.rest_bytes == b.rest_bytes
        assert a.sent_bytes == b.sent_bytes
        assert a.total_bytes == pytest.approx(b.total_bytes, rel=0.01)
        assert a.step_us == pytest.approx(b.step_us, rel=0.05)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_bytes_at_rest_are_those_of_adamw(num_ranks):
    """Twelve bytes a parameter, over the ranks from stage 1 on; here all sizes divide."""
    found = zgraph.plan(llama(), **BATCH, hardware="1x4-h100", num_ranks=num_ranks)
    for plan in found.stages:
        share = num_ranks if plan.stage else 1
        assert plan.rest_bytes["parameters"] + plan.rest_bytes["optimizer"] == 12 * found.num_parameters // share
    assert [p.stage for p in found.stages] == [0, 1, 2, 3]


def test_a_budget_is_met_by_computing_again_or_is_said_not_to_be():
    roomy = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3)
    (plan,) = roomy.stages
    assert plan.fits
    assert plan.again_share == 0
    assert plan.needed_bytes < plan.total_bytes
    middle = (plan.needed_bytes + plan.total_bytes) // 2
    (tight,) = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3, memory_budget=middle).stages
    assert tight.fits
    assert tight.total_bytes <= middle
    assert tight.step_us > plan.step_us
    none = zgraph.plan(
        llama(), **BATCH, hardware="h100", num_ranks=1, stage=3, offload=None, memory_budget=plan.needed_bytes // 2
    )
    assert none.best is None
    assert "no stage fits" in none.reason
    assert "take more ranks" in str(none)


def test_the_stage_is_chosen_for_speed_among_those_that_fit():
    roomy = zgraph.plan(llama(), **BATCH, hardware="8x8-h100")
    assert roomy.num_ranks == 64
    assert roomy.best is not None
    assert all(roomy.best.step_us <= 1.01 * p.step_us for p in roomy.stages)
    least = min(p.total_bytes for p in roomy.stages)
    tight = zgraph.plan(llama(), **BATCH, hardware="8x8-h100", memory_budget=least)
    assert tight.best is not None
    assert tight.best.total_bytes <= least
    assert f"stage {tight.best.stage}: the fastest that fits" in str(tight)


@pytest.mark.parametrize("share", [deep(2.0), 1.0, deep(0.1)])
def test_of_several_plans_all_but_the_best_stages_may_be_left_out(share):
    """The best is the same; where none fits, all are there. What is left out does not fit, or is slower."""
    options = {"hardware": ("8x8-h100",), "offload": None, **BATCH}
    (roomy,) = planning.sweep(llama(), **options)
    budget = int(share * min(p.total_bytes for p in roomy.stages))
    (whole,) = planning.sweep(llama(), **options, memory_budget=budget)
    (few,) = planning.sweep(llama(), **options, memory_budget=budget, best_only=True)
    assert few.best == whole.best
    assert set(map(str, few.stages)) <= set(map(str, whole.stages))
    if whole.best is None:
        assert few.stages == whole.stages
    else:
        out = [p for p in whole.stages if p not in few.stages]
        assert all(not p.fits or p.total_us > 1.01 * whole.best.total_us for p in out)
        assert out or share != 1.0


@pytest.mark.parametrize("stage", [1, deep(2)])
def test_what_is_alive_whatever_is_chosen_is_known_without_a_simulation(stage):
    """At stages 1 and 2 what the forward gathers stays: no way to compute again or to move needs less."""
    (roomy,) = planning.sweep(llama(), hardware=("8x8-h100",), stage=stage, **BATCH)
    plan = roomy.stages[0]
    planner = planner_of(llama(), budget=plan.total_bytes)
    shape = Shape(planner, stage, frozenset(), "")
    assert shape.rest_bytes + shape.gathered_bytes <= shape.smallest.total_bytes <= plan.total_bytes
    assert shape.gathered_bytes > 0.8 * 4 * roomy.num_parameters * 0.5
    assert shape.least_us(None) <= plan.total_us
    assert shape.may_fit
    tight = Shape(replace(planner, budget=shape.rest_bytes + shape.gathered_bytes - 1), stage, frozenset(), "")
    assert not tight.may_fit
    assert not any(tight.option(price, 0.0).fits for price in tight.prices)


def planner_of(model, budget):
    """A planner of 64 ranks."""
    more = {"tensor": 1, "context": 1, "expert": 1}
    costs = CostTable(hardware=hardware("8x8-h100"))
    make = planner_maker(costs, 64, budget, None, None, None, more)
    return make(planning.capture_samples(model, (), BATCH, None, (9, 0)))


@pytest.mark.parametrize("size", ["3MB", "2MB"])
def test_what_does_not_fit_on_the_device_lies_on_the_host(size):
    """First masters and optimizer states, 12 bytes a parameter; if that is not enough, what is computed with too."""
    found = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3, memory_budget=size)
    (plan,) = found.stages
    place = {"3MB": "optimizer", "2MB": "parameters"}[size]
    assert plan.fits
    assert plan.offload == place
    assert plan.rest_bytes["optimizer"] == 0
    assert plan.rest_bytes["parameters"] == (4 * found.num_parameters if place == "optimizer" else 0)
    assert plan.host_bytes >= 16 * found.num_parameters  # with the gradients
    assert f"with {place} on the host" in str(found)


def test_activations_are_moved_where_that_is_faster_than_computing_them_again():
    slow = hardware("h100").model_copy(update={"host_link": Link(bytes_per_s=1e6, latency_us=10.0)})
    fast = hardware("h100").model_copy(update={"host_link": Link(bytes_per_s=1e13, latency_us=0.001)})
    again, moved = (
        zgraph.plan(
            llama(), **BATCH, hardware=target, num_ranks=1, stage=3, memory_budget=5_400_000, offload="activations"
        ).stages[0]
        for target in (slow, fast)
    )
    assert again.fits
    assert moved.fits
    assert again.again_share > 0
    assert again.moved_share < 0.01
    assert moved.again_share == 0
    assert moved.moved_share > 0
    assert moved.host_bytes > 0


def test_a_host_without_room_is_no_place_to_offload_to():
    small_host = hardware("h100").model_copy(update={"host_memory_bytes": 10_000})
    found = zgraph.plan(llama(), **BATCH, hardware=small_host, num_ranks=1, stage=3, memory_budget="3MB")
    assert found.best is None


def test_small_parameters_stay_whole_where_the_network_is_the_bound():
    slow = Link(bytes_per_s=1e8, latency_us=1.0)
    cluster = hardware("8x8-h100").model_copy(update={"within": slow, "between": slow})
    everything = zgraph.plan(llama(), **BATCH, hardware=cluster, stage=[0, 1, 2, 3])
    budget = everything.stages[0].needed_bytes - 1
    found = zgraph.plan(llama(), **BATCH, hardware=cluster, memory_budget=budget, offload=None)
    best = found.best
    assert best is not None
    assert best.whole
    assert best.stage > 0
    assert all(1.01 * best.total_us < plan.total_us for plan in found.stages[:4] if plan.fits)
    assert best.total_bytes <= budget
    sizes = {name: p.numel() for name, p in llama().named_parameters()}
    sharded = [size for name, size in sizes.items() if best.stage_of(name) == best.stage]
    assert max(sizes[name] for name in best.whole) < min(sharded)
    assert "small parameters kept whole" in str(found)


def test_mistakes_are_named():
    with pytest.raises(HardwareError, match="did you mean h100"):
        zgraph.plan(llama(), **BATCH, hardware="h10")
    with pytest.raises(UsageError, match="stage must be"):
        zgraph.plan(llama(), **BATCH, stage=4)
    with pytest.raises(UsageError, match="num_ranks"):
        zgraph.plan(llama(), **BATCH, num_ranks=0)
    with pytest.raises(HardwareError, match="do not fill hosts"):
        zgraph.plan(llama(), **BATCH, hardware="8x8-h100", num_ranks=12)


def test_a_host_without_room_for_all_activations_leaves_them_to_be_computed_again():
    """Moving everything is not the only way to fit: what fits without a host fits beside a small one."""
    ids = torch.zeros(8, 512, dtype=torch.int64)
    small_host = hardware("h100").model_copy(update={"host_memory_bytes": 10_000})
    options = {"input_ids": ids, "labels": ids, "num_ranks": 1, "stage": 3, "memory_budget": "80MB"}
    (alone,) = zgraph.plan(llama(num_layers=2), hardware="h100", offload=None, **options).stages
    (beside,) = zgraph.plan(llama(num_layers=2), hardware=small_host, **options).stages
    assert alone.fits
    assert beside == alone


class Words(nn.Module):
    """A projection to many words, whose logits only the loss reads."""

    def __init__(self, num_words: int = 100_000) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(num_words, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, num_words, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.inner(self.embed(ids))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_kernels_are_those_that_compile_would_take():
    """On GPUs the default takes the loss block by block where the logits have no room; nowhere else is it another."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = Words()
    ids = torch.zeros(2, 128, dtype=torch.int64)
    options = {"hardware": "h100", "num_ranks": 1, "stage": 0, "offload": None}
    for budget, is_small in (("300MiB", True), ("2GiB", False)):
        plans = [
            zgraph.plan(model, ids, ids, **options, memory_budget=budget, kernels=k) for k in (None, "auto", "aten")
        ]
        default, auto, aten = (plan.stages[0] for plan in plans)
        assert default == auto
        assert (auto.total_bytes < 0.7 * aten.total_bytes) == is_small
        assert (auto == aten) != is_small
        assert auto.fits
        assert aten.fits != is_small
    with pytest.raises(UsageError, match="kernels must be"):
        zgraph.plan(model, ids, ids, kernels="fast")


def test_float8_is_planned_at_its_rate():
    """A wide layer: its products take less, the casts beside them something, and there are as many FLOP."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 8192, bias=False), nn.SiLU(), nn.Linear(8192, 8192, bias=False))
    x = torch.empty(8192, 8192, device="meta", dtype=torch.bfloat16)
    options = {"hardware": "h100", "num_ranks": 1, "stage": 0, "param_dtype": "bf16"}
    wide, tensors, rows = (
        zgraph.plan(model, x, **options, compute=c).stages[0] for c in (None, "float8", "float8-rowwise")
    )
    assert wide.flop == tensors.flop == rows.flop
    assert 0.4 * wide.step_us < tensors.step_us < 0.9 * wide.step_us
    assert tensors.step_us < rows.step_us < wide.step_us
    with pytest.raises(UsageError, match="compute must be"):
        zgraph.plan(model, x, compute="float4")


def test_the_fastest_way_that_also_fits_when_reserved_is_taken():
    """Of ways that fit in what is allocated, one may reserve too much; a slower one may not."""
    ways = {"fast": 1.0, "slow": 3.0, "slower": 4.0}
    options = {name: SimpleNamespace(name=name, price=us) for name, us in ways.items()}
    for room, expected in (({"fast", "slow", "slower"}, "fast"), ({"slow", "slower"}, "slow"), (set(), None)):
        shape = SimpleNamespace(
            may_fit=True,
            fitting=list(reversed(options.values())),
            least_us=lambda price: price / 2,
            finished=lambda way: SimpleNamespace(total_us=ways[way.name]),
            reserving=lambda _, way, room=room: SimpleNamespace(name=way.name, fits=way.name in room),
        )
        found = Planner._fastest(SimpleNamespace(budget=1), shape)
        assert getattr(found, "name", None) == expected
        assert Planner._fastest(SimpleNamespace(budget=1), shape, limit_us=0.4) is None
