"""Lion: steps of one length in every coordinate, along the sign of a moment (Chen et al.: "Symbolic discovery of
optimization algorithms", 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.optimizer import ParamsT

from zgraph.codegen import updates
from zgraph.codegen.spec import KernelSpec
from zgraph.optim.blocks import blocks
from zgraph.optim.flat import FlatOptimizer, Group, Kernels, check_numbers
from zgraph.optim.runs import Piece


class Lion(FlatOptimizer):
    """Lion over local shards.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain.
        lr: the learning rate, about a tenth of AdamW's.
        betas: how much of the moment goes into the sign, and the moment's decay.
        weight_decay: decoupled from the gradient.
        kernels: "aten" or "triton", as in `FlatOptimizer`.

    Raises:
        UsageError: an argument means nothing.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kernels: Kernels = "aten",
    ) -> None:
        check_numbers({"lr": lr, "weight_decay": weight_decay}, {"beta1": betas[0], "beta2": betas[1]})
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, kernels)

    def _keys(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def _aten(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        beta1, beta2 = group["betas"]
        rate, decay = self._scalars(group, age)
        for parameters, gradients, moments in blocks(pieces):
            signs = torch._foreach_lerp(moments, gradients, 1 - beta1)
            torch._foreach_sign_(signs)
            if decay != 1:
                torch._foreach_mul_(parameters, decay)
            torch._foreach_add_(parameters, signs, alpha=-rate)
            torch._foreach_lerp_(moments, gradients, 1 - beta2)

    def _spec(self, group: Group, columns: int, parameter: str, gradient: str, copy: str) -> KernelSpec:
        return updates.lion(columns, *group["betas"], parameter, gradient, copy)

    def _scalars(self, group: Group, age: float) -> tuple[float, ...]:
        rate = float(group["lr"])
        return rate, 1 - rate * group["weight_decay"]
