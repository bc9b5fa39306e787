"""SGD and Lion beside AdamW: torch's own numbers and the paper's, in groups, with gaps, and as generated kernels."""

from collections.abc import Callable, Iterable
from copy import deepcopy

import pytest
import torch
from torch import nn

from zgraph.codegen import kernels, updates
from zgraph.errors import KernelError, UsageError
from zgraph.optim import SGD, AdamW, Lion


class PaperLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., 2023, line by line."""

    def __init__(self, params: Iterable, lr: float = 1e-4, betas=(0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    update = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                    p -= group["lr"] * (update + group["weight_decay"] * p)
                    m.copy_(beta2 * m + (1 - beta2) * p.grad)


CASES: dict[str, tuple[Callable, Callable, dict]] = {
    "adamw": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (SGD, torch.optim.SGD, {}),
    "sgd-decay": (SGD, torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd-momentum": (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "lion": (Lion, PaperLion, {"weight_decay": 0.1}),
}


def parameters(dtype: torch.dtype = torch.float32, width: int = 401) -> list[nn.Parameter]:
    """The last is not dense in the order of its dimensions, and one is larger than Lion's blocks."""
    dice = torch.Generator().manual_seed(0)
    shapes = [(), (7,), (350, width), (33, 31), (1025,)]
    made = [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in shapes]
    return [*made, nn.Parameter(torch.randn(6, 5, generator=dice).to(dtype).t())]


def run(found: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with a schedule; one parameter has no gradient at the first step, another none at the third."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in steps:
        dice = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(found):
            gradient = torch.randn(parameter.shape, generator=dice).to(parameter.dtype)
            parameter.grad = None if (step, index) in ((0, 1), (2, 3)) else gradient
        optimizer.step()
        schedule.step()


def groups(found: list[nn.Parameter]) -> list[dict]:
    return [{"params": found[:2]}, {"params": found[2:], "lr": 3e-3}]


def assert_close(found: list[nn.Parameter], wanted: list[nn.Parameter], rtol: float = 1e-6) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).detach().norm()) <= rtol * float(other.detach().norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["aten", "triton"])
def test_ten_steps_are_those_of_torch_and_of_the_paper(name, how):
    make, make_reference, options = CASES[name]
    width = {"aten": 401, "triton": 4}[how]  # the interpreter takes its time
    ours, theirs = parameters(width=width), parameters(width=width)
    optimizer, reference = (
        make(groups(ours), lr=1e-2, kernels=how, **options),
        make_reference(groups(theirs), lr=1e-2, **options),
    )
    run(ours, optimizer, range(6))
    run(theirs, reference, range(6))
    assert_close(ours, theirs)
    other = make(groups(ours), lr=1e-2, kernels=how, **options)
    other.load_state_dict(reference.state_dict())
    reference.load_state_dict(deepcopy(optimizer.state_dict()))
    run(ours, other, range(6, 10))
    run(theirs, reference, range(6, 10))
    assert_close(ours, theirs)
    names = [{key for s in o.state.values() for key in s if s[key] is not None} for o in (other, reference)]
    assert names[0] == names[1]
    assert all(v.shape in (p.shape, ()) for p, s in other.state.items() for v in s.values())


@pytest.mark.parametrize("name", CASES)
def test_parameters_in_bfloat16_keep_their_dtype(name):
    make, make_reference, options = CASES[name]
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    run(ours, make(ours, lr=1e-2, **options), range(4))
    run(theirs, make_reference(theirs, lr=1e-2, **options), range(4))
    assert_close(ours, theirs, 3e-2)  # torch's own rounds after every op
    assert {p.dtype for p in ours} == {torch.bfloat16}


def test_what_the_user_puts_into_the_state_is_taken():
    ours, theirs = parameters(), parameters()
    pairs = [(ours, SGD(ours, lr=0.1, momentum=0.9)), (theirs, torch.optim.SGD(theirs, lr=0.1, momentum=0.9))]
    for found, optimizer in pairs:
        run(found, optimizer, range(2))
        optimizer.state[found[2]]["momentum_buffer"] = torch.ones_like(found[2])
        optimizer.state[found[3]].clear()
        run(found, optimizer, range(3, 5))
    assert_close(ours, theirs)


def test_bad_arguments_and_gradients_are_refused():
    found = parameters()
    for make, bad in (
        (SGD, {"lr": -1}),
        (SGD, {"momentum": -0.1}),
        (SGD, {"nesterov": True}),
        (Lion, {"betas": (0.9, 1.0)}),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        (Lion, {"weight_decay": float("nan")}),
        (Lion, {"kernels": "cuda"}),
    ):
        with pytest.raises(UsageError):
            make(found, **bad)
    words = nn.Embedding(5, 3, sparse=True)
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        SGD(words.parameters()).step()


def test_a_kernel_writes_over_its_inputs_where_they_fit():
    spec = updates.sgd(8, 0.0, 0.0, False)
    p, g, rate = torch.ones(3, 8), torch.full((3, 8), 2.0), torch.tensor(0.25)
    assert kernels.launch(spec, [p, g, rate], 3, [p]) == [p]
    assert torch.equal(p, torch.full((3, 8), 0.5))
    for bad in ([], [p.bfloat16()], [p[:2]], [torch.ones(8, 3).t()]):
        with pytest.raises(KernelError, match="leave out= away"):
            kernels.launch(spec, [p, g, rate], 3, bad)
