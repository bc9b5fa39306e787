"""Inputs of any length, padded to a few that are captured once each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import small
import zgraph
from zgraph.errors import UsageError

from .lockstep import ddp
from .pool import Pool

PAD = {"input_ids": 0, "attention_mask": 0, "labels": -100}
GIVEN = ((5, 7, 8, 12, 3), (6, 16, 2, 9, 8))
"""Lengths of each rank's batches: those of the first are in the first two sizes."""


def llama() -> nn.Module:
    torch.manual_seed(0)
    return small.llama(32, 1, 50)


def batch(seed: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (3, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train(mesh: DeviceMesh | None) -> tuple[list[float], list[float], int, list[int]]:
    """Losses and gradients' norms with sizes, then eagerly; the graphs that were captured; the logits' lengths."""
    rank = mesh.get_rank() if mesh is not None else 0
    found: list[list[float]] = []
    num_graphs, seen = 0, []
    for lengths in (zgraph.Lengths((8, 16), PAD), None):
        model = llama()
        if lengths is not None:
            model = zgraph.compile(model, mesh=mesh, lengths=lengths)
        elif mesh is not None:
            model = ddp(model, mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        numbers = []
        for step, length in enumerate(GIVEN[rank]):
            out: Any = model(**batch(10 * step + rank, length))
            out.loss.backward()
            numbers += [out.loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))]
            optimizer.step()
            optimizer.zero_grad()
            if lengths is not None:
                seen.append(out.logits.shape[1])
        if lengths is not None:
            num_graphs = len(zgraph.report(model).entries)
        found.append(numbers)
    return found[0], found[1], num_graphs, seen


def check(found: tuple[list[float], list[float], int, list[int]], rank: int) -> None:
    padded, plain, num_graphs, seen = found
    assert padded == pytest.approx(plain, rel=2e-6)
    assert num_graphs == 2
    assert seen == [*GIVEN[rank]]


def test_losses_are_those_of_eager_calls_unpadded_and_each_size_is_captured_once(pool: Pool) -> None:
    check(train(None), 0)
    for rank, found in enumerate(pool.run(train, 2)):
        check(found, rank)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 8)

    def forward(self, x: Tensor, y: Tensor | None = None, **others: Any) -> tuple[Tensor, Tensor]:
        hidden = F.gelu(self.layer(x.unsqueeze(-1)))
        return hidden, hidden.sum(1)


def test_mistakes_are_told_with_the_remedy() -> None:
    def said(call: Any) -> str:
        with pytest.raises(UsageError) as caught:
            call()
        return str(caught.value)

    assert "ascending numbers" in said(lambda: zgraph.Lengths((8, 4), {"x": 0}))
    assert "pads nothing" in said(lambda: zgraph.Lengths((8,), {"x": None}))
    wrong = zgraph.Lengths((8,), {"input_idz": 0})
    assert "did you mean input_ids?" in said(lambda: zgraph.compile(llama(), lengths=wrong))
    assert "leave dynamic=True out" in said(
        lambda: zgraph.compile(llama(), dynamic=True, lengths=zgraph.Lengths((8,), PAD))
    )
    assert "must be a zgraph.Lengths" in said(lambda: zgraph.compile(llama(), lengths=(8, 16)))
    model = zgraph.compile(llama(), lengths=zgraph.Lengths((8, 16), PAD))
    given = batch(0, 5)
    assert "longer than the largest of lengths, 16" in said(lambda: model(**batch(0, 17)))
    ids = given["input_ids"]
    assert "pads attention_mask, which this call leaves out" in said(lambda: model(ids, labels=ids))
    assert "equally long" in said(lambda: model(**{**given, "labels": ids[:, :4]}))
    positions = torch.arange(5).expand(3, 5)
    assert "position_ids is as long" in said(lambda: model(**given, position_ids=positions))
    assert model(input_ids=ids, attention_mask=given["attention_mask"]).logits.shape == (3, 5, 50)
    x = torch.randn(4, 5)
    for options in ({"cut": ()}, {"cut": (0,)}):
        net = zgraph.compile(Pooled(), lengths=zgraph.Lengths((8,), {"x": 0}, **options))
        assert "as long as the padded inputs; name it in Lengths(cut=...)" in said(lambda net=net: net(x))
    net = zgraph.compile(Pooled(), lengths=zgraph.Lengths((8,), {"x": 0}, cut=(0,), keep=(1,)))
    hidden, total = net(x)
    assert (hidden.shape, total.shape) == ((4, 5, 8), (4, 8))
