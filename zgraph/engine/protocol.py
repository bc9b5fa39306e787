"""Protocol of an engine, as checkpoints and monitors need it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from zgraph.engine.checkpoint.ranks import Ranks
from zgraph.engine.config.read import Config
from zgraph.engine.data import EngineLoader
from zgraph.engine.loss_scale import LossScale


class Trains(Protocol):
    """An engine, as `zgraph.engine.engine.Engine` is one."""

    module: nn.Module
    config: Config
    optimizer: Optimizer | None
    lr_scheduler: Any
    training_dataloader: EngineLoader | None
    loss_scaler: LossScale
    accumulation: int
    global_steps: int
    micro_steps: int
    skipped_steps: int
    pending: int
    awaits_step: bool
    ranks: Ranks

    @property
    def global_samples(self) -> int: ...

    @property
    def cur_scale(self) -> float: ...

    def zero_grad(self) -> None: ...

    def zero_optimization_stage(self) -> int: ...

    def fp16_enabled(self) -> bool: ...

    def get_lr(self) -> list[float]: ...

    def get_global_grad_norm(self) -> float | None: ...
