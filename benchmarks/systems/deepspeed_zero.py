"""DeepSpeed ZeRO-1, 2 and 3, with torch's AdamW and its defaults but for clipping; small buckets in all rows but one,
which overlap more of a small model."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.systems.base import LEARNING_RATE, Role, Step, System

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""25 MiB of fp32, as DDP's. With the default, 500 million, one bucket holds all of these models."""


def config(stage: int, bucket_elements: int | None) -> dict[str, Any]:
    """A DeepSpeed configuration that trains as torch.optim.AdamW does by default.

    bucket_elements: None keeps the default sizes.
    """
    keys = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    sizes = {} if bucket_elements is None else dict.fromkeys(keys, bucket_elements)
    adamw = {"lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own book-keeping: the batches are handed to it
        "gradient_clipping": 0.0,  # the default is 1.0, which would train another run
        "zero_optimization": {"stage": stage, **sizes},
        "optimizer": {"type": "AdamW", "params": {**adamw, "torch_adam": True}},
    }


def prepare(
    model: nn.Module, device: torch.device, *, stage: int, bucket_elements: int | None = BUCKET_ELEMENTS
) -> Step:
    os.environ["DS_ACCELERATOR"] = device.type  # read when DeepSpeed is imported
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=config(stage, bucket_elements), dist_init_required=False)

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()  # clears the gradients too
        return loss.detach()

    return step


DEEPSPEED = tuple(
    System(
        name,
        Role.BASELINE,
        stage,
        partial(prepare, stage=stage, bucket_elements=bucket_elements),
        needs="deepspeed",
        extra="zgraph[bench]",
    )
    for name, stage, bucket_elements in (
        ("DeepSpeed ZeRO-1", 1, BUCKET_ELEMENTS),
        ("DeepSpeed ZeRO-2", 2, BUCKET_ELEMENTS),
        ("DeepSpeed ZeRO-3", 3, BUCKET_ELEMENTS),
        ("DeepSpeed ZeRO-3, own buckets", 3, None),
    )
)
