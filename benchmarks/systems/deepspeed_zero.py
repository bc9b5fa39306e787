"""DeepSpeed ZeRO-1, 2 and 3, with torch's AdamW; but for bucket sizes and clipping, its defaults."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.systems.base import LEARNING_RATE, Role, Step, System

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""25 MiB of fp32, as DDP's. The default, 500 million, is no faster on these models and takes 2 GB."""


def config(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration that trains as torch.optim.AdamW does by default."""
    adamw = {"lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own book-keeping: the batches are handed to it
        "gradient_clipping": 0.0,  # the default is 1.0, which would train another run
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        },
        "optimizer": {"type": "AdamW", "params": {**adamw, "torch_adam": True}},
    }


def prepare(model: nn.Module, device: torch.device, *, stage: int) -> Step:
    os.environ["DS_ACCELERATOR"] = device.type  # read when DeepSpeed is imported
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config(stage), dist_init_required=False)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()  # clears the gradients too
        return loss.detach()

    return step


DEEPSPEED = tuple(
    System(
        f"DeepSpeed ZeRO-{stage}",
        Role.PEER,
        stage,
        partial(prepare, stage=stage),
        needs="deepspeed",
        extra="zgraph[bench]",
    )
    for stage in (1, 2, 3)
)
