"""Ops that call functions train as in eager PyTorch: branches, loops, scans, attention by functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as mapped
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import deep

from .nets import built, dice
from .pool import Pool


class Branch(nn.Module):
    """One of two layers, or of three functions: a branch within a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        made = torch.cond(
            x.sum() > 0,
            lambda x: self.one(x).sin(),
            lambda x: torch.cond(x.max() > 1, lambda x: self.other(x), lambda x: x.cos(), (x,)),
            (x,),
        )
        return made.square().mean()


class Loop(nn.Module):
    """Three turns of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def turn(count: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return count + 1, self.layer(x).sin()

        return while_loop(lambda count, x: count < 3, turn, (torch.tensor(0), x))[1].square().mean()


class Rows(Loop):
    """A recurrence over rows, and a layer on each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last, each = scan(lambda c, x: (self.layer(c).sin() + x, (c * x).clone()), torch.zeros(8), x)
        return last.square().mean() + mapped(lambda row: self.layer(row).cos(), each).mean()


class Attention(nn.Module):
    """Causal attention with a learned bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bias = nn.Linear(8, 16), nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.layer(x).view(1, -1, 2, 8).transpose(1, 2)
        size = x.shape[0]
        mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, size, size, device="cpu")
        made = flex.flex_attention(
            heads, heads, heads, score_mod=lambda score, b, h, q, k: score + self.bias[h] * (q - k), block_mask=mask
        )
        return made.square().mean()


@contextmanager
def trained_on_processors() -> Iterator[None]:
    """torch refuses attention with gradients on processors, though its dense kernels have them."""
    before, flex._validate_device = flex._validate_device, lambda *tensors: None
    try:
        yield
    finally:
        flex._validate_device = before


def error(mesh: DeviceMesh, kind: type[nn.Module]) -> float:
    """How far losses, and parameters after three steps, are from eager PyTorch's on the rows of all ranks."""
    ours, theirs = zgraph.compile(built(kind)(), stage=3, mesh=mesh), built(kind)()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    errors = []
    with trained_on_processors():
        for step in range(3):
            batches = [torch.randn(6, 8, generator=dice(10 * step + r)) for r in range(mesh.size())]
            own = batches[mesh.get_local_rank()]
            with torch.no_grad():
                errors.append(float((ours(own) - theirs(own)).abs()))
            ours(own).backward()
            (sum(theirs(x) for x in batches) / len(batches)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
        errors.append(float((whole - parameter).abs().max()))
    return max(errors)


@pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [
        (Branch, 2),
        (Attention, 2),
        (Loop, 1),
        *(deep(*case) for case in ((Branch, 1), (Attention, 1), (Loop, 2), (Rows, 1), (Rows, 2))),
    ],
)
def test_functions_train_as_eagerly(pool: Pool, kind: type[nn.Module], num_ranks: int) -> None:
    assert max(pool.run(error, num_ranks, kind)) < 1e-6


def test_torch_says_what_it_cannot_differentiate() -> None:
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        zgraph.compile(Attention(), stage=3)(torch.randn(6, 8))
