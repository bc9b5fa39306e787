"""Optimizers: torch's own, zgraph's, and those of other packages."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import zgraph
from benchmarks.habit.nets import Classifier, rows
from benchmarks.habit.side import Side, numbered, values
from benchmarks.habit.table import Found, Habit, Table

TABLE = Table("optimizers")
Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def _run(make: Make, own: Make | None, side: Side) -> Found:
    """Some steps by closures, which every optimizer takes."""
    model = side.model(Classifier)
    chosen = own if side.is_zgraph and own is not None else make
    matrices_alone = "Muon" in repr(chosen)
    optimizer = chosen([p for p in model.parameters() if p.dim() == 2 or not matrices_alone])
    losses = []
    for step in range(4):
        batch = rows(side.seed(step))

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            losses.append(loss.detach())
            return loss

        optimizer.step(closure)
    return {**numbered(losses), **values(model)}


def _listed(name: str, make: Make, own: Make | None = None, package: str = "", tolerance: float = 1e-5) -> None:
    run = functools.partial(_run, make, own)
    TABLE.append(Habit(name.replace(".", "_").lower(), f"`{name}`", TABLE.group, run, tolerance, package=package))


TORCH: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 1e-2, "amsgrad": True},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2, "momentum": 0.5, "centered": True},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 1e-2},
    "ASGD": {"lr": 0.1},
    "Rprop": {"lr": 1e-2},
    "Adafactor": {"lr": 1e-2},
    "LBFGS": {"lr": 0.1},
    "Muon": {"lr": 1e-2},
}

for _name, _options in TORCH.items():
    _rounds = 2e-2 if _name == "Muon" else 1e-5  # it iterates in bf16
    _listed(f"torch.optim.{_name}", functools.partial(getattr(torch.optim, _name), **_options), tolerance=_rounds)

for _name in ("AdamW", "SGD"):
    _options = TORCH[_name]
    _listed(
        f"zgraph.optim.{_name}",
        functools.partial(getattr(torch.optim, _name), **_options),
        functools.partial(getattr(zgraph.optim, _name), **_options),
    )


def _schedule_free(kind: str, side: Side) -> Found:
    """Schedule-free optimizers are told when to train, and when to evaluate."""
    import schedulefree

    model = side.model(Classifier)
    optimizer = getattr(schedulefree, kind)(model.parameters(), lr=0.05)
    losses = []
    optimizer.train()
    for step in range(4):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    optimizer.eval()
    return {**numbered(losses), **values(model)}


def _of_package(package: str, kind: str, parameters: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    return getattr(importlib.import_module(package), kind)(parameters, **options)


for _name in ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"):
    _run_it = functools.partial(_schedule_free, _name)
    TABLE.append(Habit(_name.lower(), f"`schedulefree.{_name}`", TABLE.group, _run_it, package="schedulefree"))

_listed("prodigyopt.Prodigy", functools.partial(_of_package, "prodigyopt", "Prodigy"), package="prodigyopt")

for _name in (
    "SOAP",
    "Shampoo",
    "CAME",
    "Lamb",
    "Kron",
    "DAdaptAdam",
    "Lion",
    "AdaBelief",
    "AdEMAMix",
    "StableAdamW",
    "Yogi",
    "Tiger",
):
    _listed(
        f"pytorch_optimizer.{_name}",
        functools.partial(_of_package, "pytorch_optimizer", _name),
        package="pytorch_optimizer",
    )

for _name in ("Adan", "LARS", "ADOPT", "MADGRAD"):
    _make = functools.partial(_of_package, "pytorch_optimizer", _name)
    _listed(f"pytorch_optimizer.{_name}", _make, functools.partial(_make, foreach=False), package="pytorch_optimizer")

for _name in ("AdamW8bit", "AdamW4bit"):
    _listed(f"torchao.optim.{_name}", functools.partial(_of_package, "torchao.optim", _name), package="torchao")
