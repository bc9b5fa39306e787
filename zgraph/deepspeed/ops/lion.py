"""`deepspeed.ops.lion`: Lion over flat shards under DeepSpeed's names and with its defaults."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from zgraph.deepspeed.ops.states import check_states
from zgraph.optim import Lion


class FusedLion(Lion):
    """`zgraph.optim.Lion` as DeepSpeed's is made."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, (betas[0], betas[1]), weight_decay)


class DeepSpeedCPULion(Lion):
    """`zgraph.optim.Lion` as DeepSpeed's CPULion is made. It runs on the host for parameters that are there."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        check_states(fp32_optimizer_states)
        super().__init__(model_params, lr, (betas[0], betas[1]), weight_decay)
