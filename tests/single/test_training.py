"""Without a process group, every stage trains as plain eager does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import zgraph

from .nets import Conv, Inputs, Llama, Mlp, built, images, rows, words


def train(model: nn.Module, batches: Callable[[int], Inputs], num_micro: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(5):
        for micro in range(num_micro):
            torch.manual_seed(10 * step + micro)
            loss = model(*batches(10 * step + micro))
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """The norm of the difference of all entries of two models' state dicts, over the norm of the second's."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    pairs = list(zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    error = sum((a - b).double().square().sum().item() for a, b in pairs)
    return (error / sum(b.double().square().sum().item() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("kind", "batches"), [(Mlp, rows), (Conv, images)])
def test_every_stage_is_eager_to_the_last_bit(
    kind: type[nn.Module], batches: Callable[[int], Inputs], stage: int
) -> None:
    plain, model = built(kind), zgraph.compile(built(kind), stage=stage)
    assert train(model, batches, 2) == train(plain, batches, 2)
    assert distance(model, plain) == 0


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_is_eager_but_for_the_order_of_sums(stage: int) -> None:
    """Where gradients of several uses are added (residuals, tied weights), the order is the captured graph's."""
    plain, model = built(Llama), zgraph.compile(built(Llama), stage=stage)
    assert train(model, words, 2) == pytest.approx(train(plain, words, 2), rel=1e-6)
    assert distance(model, plain) <= 1e-6


@pytest.mark.parametrize("stage", [0, 3])
def test_compute_in_bf16_keeps_fp32_masters(stage: int) -> None:
    model = zgraph.compile(built(Mlp), stage=stage, param_dtype=torch.bfloat16)
    masters, computing = built(Mlp), built(Mlp).bfloat16()
    torch.manual_seed(1)
    loss = model(*rows(0))
    loss.backward()
    torch.manual_seed(1)
    x, y = rows(0)
    expected = computing(x.bfloat16(), y)
    expected.backward()
    assert loss.dtype is torch.bfloat16
    assert loss.item() == expected.item()
    for ours, theirs, master in zip(model.parameters(), computing.parameters(), masters.parameters(), strict=True):
        assert torch.equal(ours, master)
        assert torch.equal(ours.grad, theirs.grad.float())


@pytest.mark.parametrize("stage", range(4))
def test_no_sync_changes_nothing_on_one_rank(stage: int) -> None:
    plain, model = built(Mlp), zgraph.compile(built(Mlp), stage=stage)
    for index in range(3):
        for net in (plain, model):
            torch.manual_seed(index)
            loss = net(*rows(index))
            if net is model and index < 2:
                with zgraph.no_sync(model):
                    loss.backward()
            else:
                loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=0)


def test_evaluation_and_new_sizes() -> None:
    plain, model = built(Mlp), zgraph.compile(built(Mlp))
    for net in (plain.eval(), model.eval()):
        assert not net.training
    for num_rows in (6, 4, 9, 6):
        x, y = torch.randn(num_rows, 12), torch.randint(5, (num_rows,))
        assert torch.equal(model(x, y), plain(x, y))
        with torch.no_grad():
            assert torch.equal(model(x, y), plain(x, y))
        with torch.inference_mode():
            assert torch.equal(model(x, y), plain(x, y))


class Branching(Mlp):
    """A branch that depends on data."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x, y)
        return loss * 2 if loss.item() > 1.5 else loss * 3


@pytest.mark.parametrize("fullgraph", [False, "eager"])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_graph_break_without_a_full_graph(stage: int, fullgraph: bool | str) -> None:
    plain = built(Branching)
    with pytest.warns(UserWarning, match="all parameters are gathered") if fullgraph else nullcontext():
        model = zgraph.compile(built(Branching), stage=stage, fullgraph=fullgraph)
    assert train(model, rows, 2) == train(plain, rows, 2)
    assert distance(model, plain) == 0


def test_hooks_run_once_a_backward() -> None:
    for stage in (0, 3):
        model, seen = zgraph.compile(built(Mlp), stage=stage), []
        model.last.bias.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        for index in range(2):
            model(*rows(index)).backward()
        assert len(seen) == 2
        assert torch.equal(seen[1], model.last.bias.grad)
