"""AdamW in few bytes: codes, rounding at random, and updates near those of torch's."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from zgraph.errors import UsageError
from zgraph.optim import CompactAdamW
from zgraph.optim.compact import CODES, SCALES
from zgraph.optim.quantised import BLOCK, decode, encode, num_blocks, values_of
from zgraph.optim.rounding import stochastic

CPU = torch.device("cpu")
SHAPES = [(64, 300), (7, 9), (65,), (), (33, 8, 40)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    dice = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in SHAPES]


def run(found: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps along gradients whose mean is not 0; one parameter has none at the second."""
    for step in steps:
        dice = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(found):
            gradient = (torch.randn(parameter.shape, generator=dice) + 1).to(parameter.dtype)
            parameter.grad = None if (step, number) == (1, 2) else gradient
        optimizer.step()


def test_values_are_dense_near_zero_and_the_scale_is_one_of_them() -> None:
    signed, unsigned = values_of(True, CPU), values_of(False, CPU)
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert signed[-1] == unsigned[-1] == 1
    assert float(unsigned[1]) == pytest.approx(3.25e-7)
    assert unsigned[0] == 0
    assert 0 in signed


@pytest.mark.parametrize("columns", [64, BLOCK, 3 * BLOCK - 1])
@pytest.mark.parametrize("is_signed", [True, False])
def test_a_code_is_that_of_the_nearest_value(columns: int, is_signed: bool) -> None:
    numbers = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(5)[:, None]
    numbers = numbers if is_signed else numbers.square()
    numbers[2] = 0
    codes, scales = torch.empty(5, columns, dtype=torch.uint8), torch.empty(5, num_blocks(columns))
    encode(numbers, codes, scales, is_signed=is_signed)
    found = decode(codes, scales, is_signed=is_signed)
    for at in range(0, columns, BLOCK):
        block, scale = numbers[:, at : at + BLOCK], scales[:, at // BLOCK, None]
        assert torch.equal(scale, block.abs().amax(1, keepdim=True))
        distances = (block[..., None] - values_of(is_signed, CPU) * scale[..., None]).abs()
        nearest = distances.min(-1).values if is_signed else distances[..., 1:].min(-1).values
        assert ((found[:, at : at + BLOCK] - block).abs() <= nearest + 1e-6 * scale).all()
    assert not found[2].any()
    assert is_signed or found[:2].all()


def test_rounding_is_right_on_average_and_depends_on_the_place_alone() -> None:
    values = torch.full((100_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next number
    found = stochastic(values, seed=1, step=2, number=3, start=0)
    assert {*found.unique().tolist()} == {1.0, 1 + 2**-7}
    assert float((found > 1).float().mean()) == pytest.approx(1 / 8, abs=0.005)
    for start, stop in ((0, 17), (5, 6), (8, 100), (99_991, 100_000)):
        part = stochastic(values[start:stop], seed=1, step=2, number=3, start=start)
        assert torch.equal(part, found[start:stop])
    for other in ({"seed": 2}, {"step": 3}, {"number": 4}, {"start": 1}):
        assert not torch.equal(stochastic(values, **{"seed": 1, "step": 2, "number": 3, "start": 0} | other), found)
    assert not torch.equal(found[:1000], found[1000:2000])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -1.5])
    assert stochastic(special, 0, 0, 0, 0).tolist()[:2] == [torch.inf, -torch.inf]
    assert stochastic(special, 0, 0, 0, 0)[2].isnan()
    assert stochastic(special, 0, 0, 0, 0).tolist()[3:] == [0.0, -1.5]


@pytest.mark.parametrize(("bits", "rtol"), [(32, 1e-6), (8, 2e-2)])
def test_steps_are_near_those_of_torch(bits: int, rtol: float) -> None:
    ours, theirs = parameters(), parameters()
    begun = [p.detach().clone() for p in ours]
    optimizer = CompactAdamW(ours, lr=1e-2, weight_decay=0.1, state_bits=bits)
    run(ours, optimizer, range(10))
    run(theirs, torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1), range(10))
    for one, other, before in zip(ours, theirs, begun, strict=True):
        assert float((one - other).detach().norm()) <= rtol * float((other - before).detach().norm())
    coded = [set(optimizer.state[p]) == {*CODES, *SCALES, "step"} for p in ours]
    assert coded == ([True, False, False, False, True] if bits == 8 else [False] * 5)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_small_updates_arrive_where_rounding_is_random(rounding: str) -> None:
    one = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = CompactAdamW([one], lr=1e-4, weight_decay=0.0, rounding=rounding)  # 2^-8 is the next number below
    for _ in range(50):
        one.grad = torch.ones_like(one)
        optimizer.step()
    wanted = 0.995 if rounding == "stochastic" else 1.0
    assert float(one.float().mean()) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_is_loaded_to_the_last_bit(dtype: torch.dtype) -> None:
    found = parameters(dtype)
    optimizer = CompactAdamW(found, lr=1e-2, seed=7)
    run(found, optimizer, range(3))
    others = [nn.Parameter(p.detach().clone()) for p in found]
    resumed = CompactAdamW(others, lr=1.0)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    run(found, optimizer, range(3, 6))
    run(others, resumed, range(3, 6))
    assert all(map(torch.equal, found, others))


def test_bad_arguments_are_refused() -> None:
    for bad in ({"state_bits": 4}, {"rounding": "up"}, {"seed": -1}, {"lr": -1.0}):
        with pytest.raises(UsageError):
            CompactAdamW(parameters(), **bad)
    with pytest.raises(UsageError, match="float64"):
        CompactAdamW(parameters(torch.float64))
