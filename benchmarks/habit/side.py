"""The two sides that a habit is run on: eager PyTorch with gradients averaged over the ranks, and zgraph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import zgraph

M = TypeVar("M", bound=nn.Module)


class Side:
    """Eager PyTorch: hooks average each gradient over the ranks when it is there, as DDP does.

    Args:
        stage: the ZeRO stage of the other side.
    """

    is_zgraph = False

    def __init__(self, stage: int = 3) -> None:
        self.stage = stage
        self.num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def model(self, build: Callable[[], M], **options: Any) -> M:
        """A model, the same on all ranks, ready to be trained. Options are zgraph's."""
        torch.manual_seed(0)
        return self.ready(build(), **options)

    def ready(self, model: M, **_options: Any) -> M:
        """A model that is made already, ready to be trained."""
        if self.num_ranks > 1:
            for parameter in model.parameters():
                trains = parameter.requires_grad
                parameter.requires_grad_(True).register_post_accumulate_grad_hook(_average)
                parameter.requires_grad_(trains)
            model.register_forward_pre_hook(_share_buffers)
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which gradients are accumulated. A mean of sums is a sum of means: here nothing changes."""
        return nullcontext()

    def mean(self, number: Tensor) -> Tensor:
        """The mean over the ranks."""
        if self.num_ranks == 1:
            return number
        total = number.detach().clone()
        dist.all_reduce(total)
        return total / self.num_ranks

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's."""
        shared = tensor.detach().clone()
        if self.num_ranks > 1:
            dist.broadcast(shared, 0)
        return shared

    def copy(self, model: M) -> M:
        """A deep copy, ready to be trained: hooks on parameters, which average gradients here, are not copied."""
        return self.ready(copy.deepcopy(model))

    def seed(self, number: int) -> int:
        """Seed of a batch of this rank."""
        return 100 * number + self.rank


class Compiled(Side):
    """zgraph.

    Args:
        stage: the ZeRO stage.
        options: for `zgraph.compile`.
    """

    is_zgraph = True

    def __init__(self, stage: int = 3, **options: Any) -> None:
        super().__init__(stage)
        self.options = options
        self.models: list[nn.Module] = []

    def ready(self, model: M, **options: Any) -> M:
        self.models.append(model)
        return zgraph.compile(model, **{"stage": self.stage, **self.options, **options})

    def copy(self, model: M) -> M:
        return copy.deepcopy(model)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return zgraph.no_sync(model)


def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _share_buffers(module: nn.Module, _inputs: Any) -> None:
    if hasattr(module, "generate"):  # its buffers stay as they are, and ranks generate alone
        return
    for buffer in module.buffers():
        dist.broadcast(buffer.detach(), 0)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, apart from what goes on with it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model's parameters, of those that have one."""
    return {f"{name}.grad": whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def sgd(parameters: Iterable[Any] | nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """SGD with momentum, whose steps show a gradient's size."""
    listed = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    return torch.optim.SGD(listed, lr=lr, **{"momentum": 0.9, **options})


def numbered(losses: Iterable[Tensor | float]) -> dict[str, float]:
    """Losses by the number of their step."""
    return {f"loss {index}": float(loss) for index, loss in enumerate(losses)}


def trained(
    side: Side,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    before: Callable[[], Any] = lambda: None,
) -> Mapping[str, Tensor | float]:
    """The losses of some steps, and the values of the model after them.

    Args:
        side: which.
        model: the model.
        loss: gives the loss of a step by its number.
        optimizer: SGD if none is given.
        before: called between a backward and its step.
    """
    optimizer = optimizer or sgd(model)
    losses = []
    for step in range(steps):
        made = loss(step)
        made.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(made.detach()))
    return {**numbered(losses), **values(model)}
