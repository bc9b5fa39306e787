"""Train on this file's own text at ZeRO stage 3: torchrun --nproc-per-node 2 examples/train.py"""

from pathlib import Path

import torch
from torch import nn

import zgraph

zgraph.init_distributed()  # joins the ranks of torchrun; without a launcher there is one rank
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(128, 32), nn.Flatten(), nn.Linear(8 * 32, 256), nn.GELU(), nn.Linear(256, 128))
model.to("cuda" if torch.cuda.is_available() else "cpu")
model = zgraph.compile(model, stage=3)  # in place: the same object, its parameters sharded
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
text = torch.tensor(list(Path(__file__).read_bytes()), device=next(model.parameters()).device)
windows = text.unfold(0, 9, 1)  # eight bytes, and the one that follows
for step in range(100):
    batch = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(2 * step + rank))[:64]]
    loss = nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and step % 33 == 0:
        print(f"step {step:3}: loss {loss.item():.3f}", flush=True)
if rank == 0:
    print(zgraph.report(model))
