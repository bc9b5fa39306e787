"""The same training with FSDP2 and with zgraph: torchrun --nproc-per-node 2 examples/from_fsdp2.py

The lines that differ are those of `shard`. The losses of both are printed side by side.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import zgraph

STEPS = 5


def shard(model: nn.Module, library: str) -> nn.Module:
    """Shard a model at ZeRO stage 3 with either library."""
    if library == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)
    return zgraph.compile(model, stage=3)  # the whole model: no layer is named


class Model(nn.Module):
    """Layers that each add to what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def train(model: nn.Module, rank: int) -> list[float]:
    """Train for a few steps. Nothing here knows which library shards the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    device, losses = next(model.parameters()).device, []
    data = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x, labels = torch.randn(16, 64, generator=data), torch.randint(10, (16,), generator=data)
        loss = nn.functional.cross_entropy(model(x.to(device)), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    zgraph.init_distributed()
    if not torch.distributed.is_initialized():
        raise SystemExit("FSDP2 needs a process group: torchrun --nproc-per-node 2 examples/from_fsdp2.py")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = Model().to("cuda" if torch.cuda.is_available() else "cpu")
    losses = {library: train(shard(copy.deepcopy(model), library), rank) for library in ("fsdp2", "zgraph")}
    if rank == 0:
        print("step  fsdp2     zgraph")
        for step, (one, other) in enumerate(zip(losses["fsdp2"], losses["zgraph"], strict=True), 1):
            print(f"{step:4}  {one:.6f}  {other:.6f}")


if __name__ == "__main__":
    main()
