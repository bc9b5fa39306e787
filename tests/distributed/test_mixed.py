"""Shards and plain tensors outside of the compiled model: right, or one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parameters_to_vector, prune

import zgraph
from zgraph.errors import ShardError, StateDictError, ZgraphError

from .nets import Mlp, Odd, built, rows
from .pool import Pool


def decay(model: nn.Module) -> Tensor:
    total = sum(p.pow(2).sum() for p in model.parameters())
    assert isinstance(total, Tensor)
    return 0.1 * total


def added_in_place(loss: Tensor, model: nn.Module, _rank: int) -> Tensor:
    loss += decay(model)
    return loss


TOTALS: dict[str, Callable[[Tensor, nn.Module, int], Tensor]] = {
    "added": lambda loss, model, _: loss + decay(model),
    "added in place": added_in_place,
    "stacked": lambda loss, model, _: torch.stack([decay(model), loss]).sum(),
    "then weighted by rank": lambda loss, model, rank: (loss - decay(model)) * (1 + rank),
    "multiplied": lambda loss, model, _: loss * decay(model),
}


def penalise(mesh: DeviceMesh) -> dict[str, float]:
    """For each total, the largest difference of a gradient from the mean of eager PyTorch's over the ranks."""
    rank, found = mesh.get_rank(), {}
    plain, ours = built(Odd)(), zgraph.compile(built(Odd)(), mesh=mesh)
    for name, total in TOTALS.items():
        for model in (plain, ours):
            model.zero_grad()
            total(model(*rows(rank)), model, rank).backward()
        gaps = []
        for whole, sharded in zip(plain.parameters(), ours.parameters(), strict=True):
            assert whole.grad is not None
            assert sharded.grad is not None
            dist.all_reduce(whole.grad, group=mesh.get_group())
            gaps.append(float((sharded.grad.full_tensor() - whole.grad / 2).abs().max()))
        found[name] = max(gaps)
    return found


def test_penalties_beside_the_loss_have_the_gradients_of_eager_pytorch(pool: Pool) -> None:
    for gaps in pool.run(penalise, 2):
        assert gaps.keys() == TOTALS.keys()
        assert max(gaps.values()) < 1e-6, gaps


def write(mesh: DeviceMesh) -> None:
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    weight = model.first.weight
    mask = torch.arange(weight.numel()).view(weight.shape) % 3 == 0
    expected = weight.full_tensor().detach() * mask
    expected[expected > 0.1] = 0.5
    with torch.no_grad():
        weight.mul_(mask)
        weight[expected == 0.5] = 0.5
    assert torch.equal(weight.full_tensor(), expected)
    with torch.no_grad():
        weight[:, 0] = 2.0
        model.first.bias.copy_(torch.arange(24.0))
    assert torch.equal(weight.full_tensor()[:, 0], torch.full((24,), 2.0))
    assert torch.equal(model.first.bias.full_tensor(), torch.arange(24.0))
    model.last.load_state_dict({"weight": torch.ones(5, 24), "bias": torch.arange(5.0)})
    assert torch.equal(model.last.bias.full_tensor(), torch.arange(5.0))
    weight.register_hook(lambda gradient: gradient * mask)
    model(*rows(mesh.get_rank())).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.full_tensor() == 0, ~mask)


def test_in_place_a_plain_tensor_is_the_same_on_all_ranks(pool: Pool) -> None:
    pool.run(write, 2)


def refuse(mesh: DeviceMesh) -> dict[str, tuple[type[Exception], str]]:
    model, eager = zgraph.compile(built(Mlp)(), mesh=mesh), built(Mlp)()
    x, y = rows(0)
    model(x, y).backward()
    weight = model.first.weight
    before = weight.full_tensor().detach().clone()
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    mistakes: dict[str, Callable[[], object]] = {
        "method": lambda: model.logits(x),
        "part": lambda: model.norm(torch.ones(2, 24)),
        "mask": lambda: weight * torch.ones(weight.shape),
        "numpy": lambda: weight.grad.cpu().numpy(),
        "list": lambda: weight.tolist(),
        "memory": lambda: weight.detach().storage(),
        "vector": lambda: parameters_to_vector([model.last.weight]),
        "prune": lambda: prune.l1_unstructured(model.last, "weight", amount=0.3),
        "row": lambda: weight.data[0].zero_(),
        "rows": lambda: weight.detach()[1:2].mul_(0),
        "to plain": lambda: torch.empty(weight.shape).copy_(weight.detach()),
        "eager model": lambda: eager.load_state_dict(state),
    }
    found = {}
    for name, mistake in mistakes.items():
        with pytest.raises(ZgraphError) as caught:
            mistake()
        found[name] = caught.type, str(caught.value)
    assert torch.equal(weight.full_tensor(), before)
    model(x, y).backward()
    return found


REMEDIES = {
    "method": "within `with zgraph.gathered(model):`",
    "part": "within `with zgraph.gathered(model):`",
    "mask": "p.grad.mul_(mask)",
    "row": "nothing would change",
    "rows": "nothing would change",
    "eager model": "nothing was loaded. Save whole tensors",
}


def test_what_needs_all_of_a_parameter_is_refused_with_the_line_and_the_remedy(pool: Pool) -> None:
    for found in pool.run(refuse, 2):
        for name, (kind, message) in found.items():
            assert kind is (StateDictError if name == "eager model" else ShardError)
            assert REMEDIES.get(name, "call .full_tensor() of it first, on every rank") in message, name
            assert ("nets.py:" if name == "method" else "test_mixed.py:") in message or name == "eager model"


def compile_around(mesh: DeviceMesh) -> list[list[float]]:
    """Losses of some steps: as they are, with a compiled call, with a compiled step."""
    found = []
    for around in ("nothing", "call", "step"):
        torch._dynamo.reset()
        model = zgraph.compile(built(Mlp)(), mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        call = torch.compile(model, backend="eager") if around == "call" else model

        def step(x: Tensor, y: Tensor, call: nn.Module = call, opt: torch.optim.Optimizer = optimizer) -> Tensor:
            loss: Tensor = call(x, y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        run = torch.compile(step, backend="eager") if around == "step" else step
        found.append([float(run(*rows(10 * index + mesh.get_rank()))) for index in range(3)])
    return found


def test_torch_compile_around_a_call_or_a_step_leaves_both_as_they_are(pool: Pool) -> None:
    for plain, called, stepped in pool.run(compile_around, 2):
        assert plain == called == stepped


def compile_whole(mesh: DeviceMesh) -> str:
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(lambda *batch: model(*batch), backend="eager", fullgraph=True)(*rows(0))
    return str(caught.value)


def test_torch_compile_with_fullgraph_says_what_to_leave_out(pool: Pool) -> None:
    for message in pool.run(compile_whole, 2):
        assert "Leave torch.compile out, around the model and around the training step" in message
