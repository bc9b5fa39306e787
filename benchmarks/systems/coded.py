"""Systems that send codes: DistributedDataParallel with torch's hooks, and zgraph with codes of all that it sends."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.systems.base import Role, Step, System, adamw_step
from benchmarks.systems.zgraph_stages import prepare

ONE_BUCKET_MB = 1 << 20


def in_half(model: nn.Module, device: torch.device) -> Step:
    """Gradients are averaged in fp16."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return adamw_step(wrapped)


def by_low_rank(model: nn.Module, device: torch.device, rank: int) -> Step:
    """Gradients are products of thin matrices, with error feedback, from the second step on (PowerSGD).

    All are in one bucket: the hook's collectives of several run in any order, which gloo takes for another's.
    """
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=ONE_BUCKET_MB)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return adamw_step(wrapped)


def _ours(stage: int, codec: str, parameters: str = "") -> System:
    codes: dict[str, Any] = {"gradients": codec} | ({"parameters": parameters or codec} if stage else {})
    name = f"zgraph stage {stage}, {codec}" + (f" and {parameters}" if parameters else "")
    return System(name, Role.ZGRAPH, stage, partial(prepare, stage=stage, compress=codes), "zgraph", "zgraph")


CODED = (
    System("DDP, fp16", Role.BASELINE, 0, in_half),
    *(System(f"DDP, PowerSGD rank {rank}", Role.BASELINE, 0, partial(by_low_rank, rank=rank)) for rank in (1, 4)),
    *(_ours(stage, codec) for stage in (0, 2) for codec in ("q8", "q4", "sign", "topk(1%)")),
    *(_ours(3, codec, "q4") for codec in ("q4", "topk(1%)")),
)
