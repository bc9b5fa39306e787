"""Stochastic gradient descent, plain or with momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.optimizer import ParamsT

from zgraph.bridge import private_runtime
from zgraph.codegen import updates
from zgraph.codegen.spec import KernelSpec
from zgraph.errors import UsageError
from zgraph.optim.blocks import Tensors, blocks
from zgraph.optim.flat import FlatOptimizer, Group, Kernels, check_numbers
from zgraph.optim.runs import Piece, Run

FIRST, LATER = 0.0, 1.0
"""Ages: at its first step the direction is the gradient, whatever the dampening."""


class SGD(FlatOptimizer):
    """Stochastic gradient descent over local shards, as `torch.optim.SGD` does it.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain.
        lr: the learning rate.
        momentum: how much of the last direction is kept; at 0 there is no state.
        dampening: how much less of the gradient goes into the direction, after the first step.
        weight_decay: times the parameter, added to the gradient.
        nesterov: whether to look ahead along the new direction.
        kernels: "aten" or "triton", as in `FlatOptimizer`.

    Raises:
        UsageError: an argument means nothing.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        kernels: Kernels = "aten",
    ) -> None:
        check_numbers({"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, {})
        if nesterov and (not momentum or dampening):
            raise UsageError("nesterov=True needs momentum above 0, and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, kernels)

    def _keys(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _ages(self, run: Run, indices: list[int], are_new: list[bool]) -> list[float]:
        return [FIRST if is_new else LATER for is_new in are_new]

    def _aten(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        if private_runtime.has_fused_sgd(pieces[0].parameter):
            private_runtime.fused_sgd(
                [p.parameter for p in pieces],
                [p.gradient for p in pieces],
                [s for p in pieces for s in p.states],
                lr=float(group["lr"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                is_first_step=age == FIRST,
            )
            return
        for parameters, gradients, *states in blocks(pieces):
            self._in_ops(group, age, parameters, gradients, states)

    def _in_ops(
        self, group: Group, age: float, parameters: Tensors, gradients: Tensors, states: Sequence[Tensors]
    ) -> None:
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        for directions in states:
            torch._foreach_mul_(directions, group["momentum"])
            torch._foreach_add_(directions, gradients, alpha=self._fresh(group, age))
            ahead = group["momentum"]
            gradients = (
                list(torch._foreach_add(gradients, directions, alpha=ahead)) if group["nesterov"] else directions
            )
        torch._foreach_add_(parameters, gradients, alpha=-float(group["lr"]))

    @staticmethod
    def _fresh(group: Group, age: float) -> float:
        """How much of the gradient goes into the direction."""
        return 1.0 if age == FIRST else 1 - float(group["dampening"])

    def _spec(self, group: Group, columns: int, parameter: str, gradient: str, copy: str) -> KernelSpec:
        return updates.sgd(
            columns, group["momentum"], group["weight_decay"], group["nesterov"], parameter, gradient, copy
        )

    def _scalars(self, group: Group, age: float) -> tuple[float, ...]:
        return (float(group["lr"]), self._fresh(group, age)) if group["momentum"] else (float(group["lr"]),)
