"""zgraph and DDP train the same model on the same data, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import zgraph

Context = Callable[[], AbstractContextManager[Any]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def ddp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """The reference: PyTorch's own data parallelism."""
    return DistributedDataParallel(model, process_group=mesh.get_group(), **options)


def loss_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return output if isinstance(output, torch.Tensor) else output.loss


@dataclass
class Side:
    """One of the two models, with its optimizer and the losses so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    no_sync: Context = nullcontext
    around_forward: Context = nullcontext
    losses: list[float] = field(default_factory=list)

    def accumulate(self, seed: int, inputs: Any) -> None:
        """A forward and a backward."""
        torch.manual_seed(seed)
        with self.around_forward():
            loss = loss_of(self.model, inputs)
        loss.backward()
        self.losses.append(loss.item())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lockstep:
    """The same steps of both.

    Args:
        mesh: the ranks, in a line.
        build: makes the model, with the same values every time.
        make_optimizer: called for each of the two.
        ddp_options: for DistributedDataParallel.
        around_forward: makes a context that every forward runs in.
        grid: the same ranks as a mesh of two axes, for zgraph.
        options: for `zgraph.compile`.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        build: Callable[[], nn.Module],
        make_optimizer: MakeOptimizer = adamw,
        ddp_options: dict[str, Any] | None = None,
        around_forward: Context = nullcontext,
        grid: DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        self.rank = mesh.get_local_rank()
        reference = ddp(build(), mesh, **(ddp_options or {}))
        model = zgraph.compile(build(), mesh=grid or mesh, **options)
        self.reference = Side(reference, make_optimizer(reference.parameters()), reference.no_sync, around_forward)
        self.ours = Side(model, make_optimizer(model.parameters()), lambda: zgraph.no_sync(model), around_forward)
        self.sides = (self.reference, self.ours)
        self.gradient_errors: list[float] = []
        self.seed = 0

    def step(
        self, *micro_batches: Any, no_sync: bool = False, before_update: Callable[[Side], Any] | None = None
    ) -> None:
        """One optimizer step of each over some micro-steps, with the gradients compared before it.

        Args:
            micro_batches: what the model is called with, one a micro-step.
            no_sync: run all but the last micro-step under `no_sync`.
            before_update: called with each side when its gradients are there.
        """
        for side in self.sides:
            for index, inputs in enumerate(micro_batches):
                with side.no_sync() if no_sync and index < len(micro_batches) - 1 else nullcontext():
                    side.accumulate(1000 * self.seed + 10 * index + self.rank, inputs)
            if before_update is not None:
                before_update(side)
        self.gradient_errors.append(gradient_error(self.reference.model, self.ours.model))
        for side in self.sides:
            side.update()
        self.seed += 1

    @property
    def errors(self) -> tuple[float, float]:
        """The largest relative error of any loss, and of any step's gradients."""
        pairs = zip(self.reference.losses, self.ours.losses, strict=True)
        return max(abs(b - a) / abs(a) for a, b in pairs), max(self.gradient_errors)


def gradient_error(reference: nn.Module, model: nn.Module) -> float:
    """The norm of the difference over the norm of the reference's gradient, of the rows that this rank holds."""
    theirs = dict(getattr(reference, "module", reference).named_parameters())
    error = total = 0.0
    for name, parameter in model.named_parameters():
        whole = theirs[name].grad
        assert (whole is None) == (parameter.grad is None), f"only one of the two has a gradient of {name}"
        if whole is not None and parameter.grad is not None:
            assert parameter.grad.shape == whole.shape
            error += (local(parameter.grad) - own_part(whole, parameter.grad)).double().square().sum().item()
            total += whole.double().square().sum().item()
    return (error / total) ** 0.5


def own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of `whole` that this rank holds of `like`."""
    if not (isinstance(like, DTensor) and isinstance(like.placements[-1], Shard)):
        return whole
    mesh = like.device_mesh
    rows, rank = whole.chunk(mesh.size(mesh.ndim - 1), 0), mesh.get_local_rank(mesh.ndim - 1)
    return rows[rank] if rank < len(rows) else whole[:0]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same(errors: Sequence[tuple[float, float]], loss: float = 1e-6, gradient: float = 1e-6) -> None:
    """Every rank's errors are within the tolerances."""
    for rank, (of_loss, of_gradient) in enumerate(errors):
        assert of_loss <= loss, f"rank {rank}: a loss is {of_loss:.1e} from DDP's"
        assert of_gradient <= gradient, f"rank {rank}: a gradient is {of_gradient:.1e} from DDP's"
