"""The configuration's key for float8."""

from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.errors import ZgraphError
from zgraph.ir.external_ops import FLOAT8_MM


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


def made(compute: str) -> Any:
    torch.compiler.reset()
    torch.manual_seed(0)
    engine, *_ = zgraph.initialize_engine(
        model=Net(),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "bf16": {"enabled": True},
            "zgraph": {"compute": compute},
        },
    )
    return engine


def test_a_configuration_asks_for_float8() -> None:
    engine = made("float8-rowwise")
    x = torch.randn(16, 16)
    losses = []
    for _ in range(8):
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    (entry,) = zgraph.report(engine.module).entries
    assert sum(n.op == FLOAT8_MM for n in entry.plan.graph.nodes) == 5


def test_another_word_is_refused() -> None:
    with pytest.raises(ZgraphError, match="compute"):
        made("float4")
