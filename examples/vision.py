"""A vision transformer, computed in bf16 within a memory budget: torchrun --nproc-per-node 2 examples/vision.py"""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import zgraph


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images with a bright quarter, and which quarter it is."""
    draw = torch.Generator().manual_seed(2 * step + rank)
    labels = torch.randint(4, (16,), generator=draw)
    images = torch.randn(16, 3, 32, 32, generator=draw)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 3
    return images, labels


def main() -> None:
    zgraph.init_distributed()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    model = ViTForImageClassification(config).to("cuda" if torch.cuda.is_available() else "cpu")
    model = zgraph.compile(model, stage=2, param_dtype=torch.bfloat16, memory_budget="64MiB")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        images, labels = (t.to(model.device) for t in batch(rank, step))
        logits = model(pixel_values=images).logits
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    if rank == 0:
        print(f"peak of a step above rest: {zgraph.report(model).step_peak_bytes / 2**20:.1f} MiB of 64")


if __name__ == "__main__":
    main()
