"""Optimizers by the names that a configuration gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch.optim import Optimizer

from zgraph import optim
from zgraph.engine.sections import Section
from zgraph.errors import UsageError

Beta = Annotated[float, Field(ge=0, lt=1)]

Groups = Sequence[Any]

_FLAT = "the update is one pass over flat shards"


class OptimizerParams(Section):
    """What an optimizer takes."""

    superseded: ClassVar[Mapping[str, str]] = dict.fromkeys(("torch_adam", "foreach", "fused", "capturable"), _FLAT)

    lr: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0

    @abstractmethod
    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        """The optimizer over these parameters, or groups of them; `folder` is where its state lies, if on disk."""


class AdamParams(OptimizerParams):
    """Adam: with decoupled weight decay, unless `adam_w_mode` is false."""

    unsupported: ClassVar[Mapping[str, str]] = {"amsgrad": "leave it out"}

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    adam_w_mode: bool = True
    bias_correction: bool = True

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        if not self.bias_correction:
            raise UsageError("optimizer.params.bias_correction: zgraph does not leave it out; remove the key")
        if not self.adam_w_mode and self.weight_decay:
            if folder is not None:
                raise UsageError('optimizer.params.adam_w_mode: state on "nvme" needs AdamW')
            return torch.optim.Adam(parameters, self.lr, self.betas, self.eps, self.weight_decay)
        place: Any = {"state": "disk", "folder": folder} if folder is not None else {}
        return optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay, **place)


class AdamWParams(AdamParams):
    """AdamW."""

    weight_decay: NonNegativeFloat = 0.01


class SGDParams(OptimizerParams):
    """SGD, with momentum or without."""

    momentum: NonNegativeFloat = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        return optim.SGD(parameters, self.lr, self.momentum, self.dampening, self.weight_decay, nesterov=self.nesterov)


class LionParams(OptimizerParams):
    """Lion."""

    lr: NonNegativeFloat = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.99)

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        return optim.Lion(parameters, self.lr, self.betas, self.weight_decay)


class AdagradParams(OptimizerParams):
    """Adagrad."""

    lr: NonNegativeFloat = 1e-2
    eps: NonNegativeFloat = 1e-10

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        return torch.optim.Adagrad(parameters, self.lr, weight_decay=self.weight_decay, eps=self.eps)


class MuonParams(OptimizerParams):
    """Muon, whose parameters are matrices."""

    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = 5
    weight_decay: NonNegativeFloat = 0.1

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(f"optimizer.type: torch {torch.__version__} has no Muon; install torch 2.9 or later")
        return torch.optim.Muon(
            parameters, self.lr, self.weight_decay, self.momentum, self.nesterov, ns_steps=self.ns_steps
        )


OPTIMIZERS: dict[str, type[OptimizerParams]] = {
    "Adam": AdamParams, "AdamW": AdamWParams, "FusedAdam": AdamParams, "CPUAdam": AdamParams, "SGD": SGDParams,
    "Lion": LionParams, "Adagrad": AdagradParams, "Muon": MuonParams,
}  # fmt: skip
