"""Optimizers by the names that a configuration gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import nn
from torch.optim import Optimizer

from zgraph import optim
from zgraph.engine.config.sections import Section
from zgraph.errors import UsageError

Beta = Annotated[float, Field(ge=0, lt=1)]

Groups = Sequence[Any]

_FLAT = "the update is one pass over flat shards"


class OptimizerParams(Section):
    """Parameters of an optimizer."""

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(("torch_adam", "foreach", "fused", "capturable"), _FLAT)

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
    """Muon for matrices of hidden layers, AdamW for the rest; each takes `lr` unless it has a rate of its own."""

    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    weight_decay: NonNegativeFloat = 0.1
    muon_lr: NonNegativeFloat | None = None
    adam_lr: NonNegativeFloat | None = None
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"

    def make(self, parameters: Groups, *, folder: Path | None = None) -> Optimizer:
        if folder is not None:
            raise UsageError('zero_optimization.offload_optimizer: state on "nvme" needs AdamW; Muon takes "cpu"')
        return optim.Muon(
            parameters,
            self.lr if self.muon_lr is None else self.muon_lr,
            self.weight_decay,
            self.momentum,
            self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn=self.adjust_lr_fn,
            adam_lr=self.lr if self.adam_lr is None else self.adam_lr,
            adam_betas=self.betas,
            adam_eps=self.eps,
        )


OPTIMIZERS: dict[str, type[OptimizerParams]] = {
    "Adam": AdamParams,
    "AdamW": AdamWParams,
    "FusedAdam": AdamParams,
    "CPUAdam": AdamParams,
    "SGD": SGDParams,
    "Lion": LionParams,
    "Adagrad": AdagradParams,
    "Muon": MuonParams,
}

_CODED = 'take "AdamW" with zgraph.compress: "sign", which codes gradients in one bit and keeps what that leaves out'
_MOMENTUM = (
    f"{_CODED}; or without an engine, which looks at gradients that are averaged already, zgraph.compile(stage=1) with "
    "zgraph.optim.OneBitAdam"
)

ABSENT_OPTIMIZERS: Mapping[str, str] = {
    "OneBitAdam": _MOMENTUM,
    "ZeroOneAdam": _MOMENTUM,
    "OneBitLamb": f"there is no LAMB; {_CODED}",
}
"""DeepSpeed's that there are not, with the remedy."""


def names_in(model: nn.Module, group: Mapping[str, Any]) -> list[str]:
    """The names that a group's parameters have in a model. Raises UsageError if one is not the model's."""
    names = {id(p): n for n, p in model.named_parameters()}
    members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    if any(id(p) not in names for p in members):
        raise UsageError("an optimizer's parameter, or one of model_parameters, is not the model's")
    return [names[id(p)] for p in members]


@contextmanager
def handed_over(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """Compile the model in here: its parameters become others, which the optimizer has afterwards.

    If that fails, it has those from before.

    Raises:
        UsageError: the optimizer has made steps, or a parameter that is not the model's.
    """
    if optimizer.state:
        raise UsageError("the optimizer has made steps already: give a new one, and load its state afterwards")
    before = [(group, group["params"], names_in(model, group)) for group in optimizer.param_groups]
    for group, _, _ in before:
        group["params"] = []
    try:
        yield
    except BaseException:
        for group, parameters, _ in before:
            group["params"] = parameters
        raise
    made = dict(model.named_parameters())
    for group, _, names in before:
        group["params"] = [made[name] for name in names]
