"""`deepspeed.ops.adam`: AdamW over flat shards under DeepSpeed's names and with its defaults."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT

from zgraph.deepspeed.absent import finder
from zgraph.deepspeed.ops.states import check_states
from zgraph.errors import UsageError
from zgraph.optim import AdamW

__getattr__ = finder(
    __name__,
    dict.fromkeys(
        ("ZenFlowCPUAdam", "ZenFlowSelectiveAdamW", "ZenFlowSelectiveAdamW_stage3"),
        "take DeepSpeedCPUAdam: there is no ZenFlow",
    ),
)


class FusedAdam(AdamW):
    """`zgraph.optim.AdamW` as DeepSpeed's FusedAdam is made.

    Args:
        params: parameters or groups of them.
        bias_correction, adam_w_mode, amsgrad: True, True and False; without weight decay `adam_w_mode` may be False.
        set_grad_none: taken: gradients are always set to None.

    Raises:
        UsageError: it asks for another Adam.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay)
        _check(self, decouples=adam_w_mode, bias_correction=bias_correction, amsgrad=amsgrad)


class DeepSpeedCPUAdam(AdamW):
    """`zgraph.optim.AdamW` as DeepSpeed's CPUAdam is made. It runs on the host for parameters that are there, as with
    `offload_optimizer` in the configuration.

    Args:
        model_params: parameters or groups of them.
        bias_correction, adamw_mode, amsgrad: True, True and False; without weight decay `adamw_mode` may be False.
        fp32_optimizer_states: True: moments have the masters' dtype.

    Raises:
        UsageError: it asks for another Adam.
    """

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        check_states(fp32_optimizer_states)
        super().__init__(model_params, lr, (betas[0], betas[1]), eps, weight_decay)
        _check(self, decouples=adamw_mode, bias_correction=bias_correction, amsgrad=amsgrad)


def _check(optimizer: AdamW, *, decouples: bool, bias_correction: bool, amsgrad: bool) -> None:
    """Refuse what AdamW would compute differently."""
    if not bias_correction:
        raise UsageError("bias_correction=False: zgraph does not leave it out; remove the argument")
    if amsgrad:
        raise UsageError("amsgrad=True: take torch.optim.AdamW(amsgrad=True)")
    if not decouples and any(group["weight_decay"] for group in optimizer.param_groups):
        raise UsageError("weight decay that is part of the gradient: take torch.optim.Adam")
