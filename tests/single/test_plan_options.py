"""Options of `zgraph.plan` that `zgraph.compile`, and the way it is called, have too."""

import pytest
import torch
from torch import nn

import small
import zgraph
from zgraph.cost import hardware
from zgraph.errors import UsageError
from zgraph.estimate import plan as planning

IDS = torch.zeros(2, 64, dtype=torch.int64)
BATCH = {"input_ids": IDS, "labels": IDS}
_CAPTURES = {}


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch):
    """All plans share a capture: the options at hand change what is made of it."""
    capture = planning.capture_samples

    def capture_samples(model, args, kwargs, param_dtype, capability):
        if param_dtype not in _CAPTURES:
            _CAPTURES[param_dtype] = capture(model, args, kwargs, param_dtype, capability)
        return _CAPTURES[param_dtype]

    monkeypatch.setattr(planning, "capture_samples", capture_samples)


def planned(stage, **options):
    with torch.device("meta"):
        model = small.llama(num_layers=5)
    options = {"hardware": "2x8-a100-80", "param_dtype": "bf16", "kernels": "aten", **options}
    return zgraph.plan(model, **BATCH, stage=stage, **options).stages[0]


def test_micro_steps():
    whole, four = planned(0), planned(0, accumulation=4)
    assert 3 * whole.step_us < four.step_us + 3 * whole.exposed_us < 4.01 * whole.step_us + 3 * whole.exposed_us
    assert four.sent_bytes == whole.sent_bytes  # gradients stay on the rank until the last
    assert four.flop == 4 * whole.flop
    assert four.total_bytes >= whole.total_bytes
    sharded = planned(3, accumulation=4)
    assert sharded.sent_bytes == pytest.approx(4 * planned(3).sent_bytes, rel=1e-6)
    kept = planned(2, accumulation=4)
    gathered = kept.sent_bytes - 4 * planned(2).sent_bytes
    assert gathered < 0  # parameters are gathered once for all micro-steps


def test_copies_of_shards():
    flat, copied = planned(3), planned(3, mesh=(2, 8))
    assert copied.rest_bytes["optimizer"] == pytest.approx(2 * flat.rest_bytes["optimizer"], rel=0.05)


def test_reductions_in_another_dtype():
    assert planned(3, reduce_dtype="fp32").sent_bytes > 1.2 * planned(3).sent_bytes


def test_recomputation():
    assert planned(3, recompute=True).again_share > 0.1 > planned(3, recompute=False).again_share
    small_budget = int(0.9 * planned(3, recompute=False).total_bytes)
    assert planned(3, memory_budget=small_budget).total_bytes < planned(3).total_bytes
    assert not planned(3, memory_budget=small_budget, recompute=False, offload=None).fits


def test_a_slower_kernel_of_attention_takes_longer():
    assert planned(0, attention="triton", num_ranks=1).step_us >= planned(0, attention="flash", num_ranks=1).step_us


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"accumulation": 0}, "accumulation must be 1 or more"),
        ({"mesh": (2, 0)}, "mesh must be two numbers"),
        ({"mesh": (2, 4), "num_ranks": 16}, "a mesh of 2 x 4 has 8 ranks, and num_ranks is 16"),
        ({"recompute": "some"}, "recompute must be"),
        ({"attention": "flash9"}, r"attention must be one of .* on a100-80, not 'flash9'"),
    ],
)
def test_what_cannot_be(options, problem):
    with pytest.raises(UsageError, match=problem):
        planned(0, **options)


def test_codes_of_gradients_are_planned(monkeypatch):
    monkeypatch.undo()
    slow = hardware("cpu").shaped(1, 4)
    slow = slow.model_copy(update={"within": slow.within.model_copy(update={"bytes_per_s": 1e6})})
    model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(8, 64)
    plain, coded, chosen = (
        zgraph.plan(model, x, hardware=slow, stage=2, compress=codec).stages[0] for codec in (None, "q4", "auto")
    )
    assert coded.total_us < plain.total_us
    assert chosen.total_us == coded.total_us
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert coded.rest_bytes["optimizer"] - plain.rest_bytes["optimizer"] == whole
    with pytest.raises(UsageError, match="what ranks compute alone"):
        zgraph.plan(model, x, hardware=slow, num_ranks=4, tensor_parallel=2, compress="q4")


def test_codes_along_the_outer_axis_are_planned():
    slow = hardware("8x8-h100")
    slow = slow.model_copy(update={"between": slow.between.model_copy(update={"bytes_per_s": 1e5})})
    model, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(8, 64)
    plain, coded = (
        zgraph.plan(model, x, hardware=slow, num_ranks=16, mesh=(2, 8), stage=2, compress=codec).stages[0]
        for codec in (None, "q4")
    )
    assert coded.total_us < 0.6 * plain.total_us
    shard = sum(4 * -(-p.shape[0] // 8) * (p.numel() // p.shape[0]) for p in model.parameters())
    more = coded.rest_bytes["optimizer"] - plain.rest_bytes["optimizer"]
    assert 1.5 * shard <= more <= 1.55 * shard, "a rest of the shard, and one of half of it"
