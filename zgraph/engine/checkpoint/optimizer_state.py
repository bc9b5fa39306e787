"""State of an optimizer, by the names of parameters: tensors, and everything else as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zgraph.engine.checkpoint.json_codec import decode, encode
from zgraph.engine.checkpoint.tensors import Tensors, fill, gathered, like, parameter_names
from zgraph.errors import CheckpointError
from zgraph.optim.flat import FlatOptimizer


class Group(BaseModel):
    """A group of an optimizer: the names of its parameters, and its options."""

    names: tuple[str, ...]
    options: dict[str, Any]


class OptimizerState(BaseModel):
    """All of an optimizer's state that is not a tensor, and the same on all ranks.

    Args:
        groups: its groups, in their order.
        values: what is no tensor of the states, by the names of parameters.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())

    groups: tuple[Group, ...] = ()
    values: dict[str, dict[str, Any]] = {}


# --- what is saved ---------------------------------------------------------------------------------------------------


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> Tensors:
    """Its tensors: `optimizer.KEY.NAME`."""
    return {
        f"optimizer.{key}.{name}": state
        for name, states in _states(module, optimizer)
        for key, state in states.items()
        if isinstance(state, torch.Tensor)
    }


def optimizer_rest(module: nn.Module, optimizer: Optimizer) -> OptimizerState:
    """The rest.

    Raises:
        CheckpointError: JSON cannot hold something; the error names the key. Or the model's state dict leaves out a
            parameter of the optimizer.
    """
    names = parameter_names(module)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [n for n, p in module.named_parameters() if id(p) in trained - names.keys()]:
        raise CheckpointError(f"the model's state_dict() leaves out {', '.join(missing)}, which the optimizer changes")
    groups = tuple(
        Group(names=tuple(names[id(p)] for p in group["params"]), options=encode(_options(group), f"group {number}"))
        for number, group in enumerate(optimizer.param_groups)
    )
    values = {
        name: found
        for name, states in _states(module, optimizer)
        if (found := {key: s for key, s in states.items() if not isinstance(s, torch.Tensor)})
    }
    return OptimizerState(groups=groups, values=encode(values, "optimizer.state"))


def _states(module: nn.Module, optimizer: Optimizer) -> Iterable[tuple[str, dict[str, Any]]]:
    names = parameter_names(module)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if states := optimizer.state.get(parameter):
                yield names[id(parameter)], states


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in group.items() if key != "params"}
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


# --- what is loaded --------------------------------------------------------------------------------------------------


class OptimizerLoad:
    """An optimizer's state on its way from a checkpoint.

    Args:
        optimizer: whose.
        module: of whose parameters.
        stored: dtype and shape of the checkpoint's tensors.

    Raises:
        CheckpointError: it is that of another optimizer.
    """

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self.optimizer, self.names = optimizer, parameter_names(module)
        self.parameters = {
            self.names[id(p)]: p for group in optimizer.param_groups for p in group["params"] if id(p) in self.names
        }
        self.found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        keys: dict[str, list[str]] = defaultdict(list)
        for full in stored:
            section, _, rest = full.partition(".")
            key, _, name = rest.partition(".")
            if section == "optimizer" and name in self.parameters:
                keys[name].append(key)
        if isinstance(optimizer, FlatOptimizer):
            optimizer.give_states(self.parameters[name] for name in keys)
        for name, theirs in keys.items():
            if isinstance(optimizer, FlatOptimizer):
                ours = optimizer.state[self.parameters[name]]
                if set(ours) != set(theirs) - ({"step"} - set(ours)):
                    raise CheckpointError(
                        f"the checkpoint has {', '.join(sorted(theirs))} of {name}, and the optimizer needs "
                        f"{', '.join(sorted(ours))}: choose the optimizer that it was saved with, or "
                        f"load_optimizer_states=False"
                    )
                self.found[name] = dict(ours)
            else:
                self.found[name] = {
                    key: like(self.parameters[name], *stored[f"optimizer.{key}.{name}"], key) for key in theirs
                }

    @property
    def targets(self) -> Tensors:
        """Where the values go, by the names that a checkpoint has for them."""
        return {f"optimizer.{k}.{name}": t for name, states in self.found.items() for k, t in states.items()}

    def finish(self, rest: OptimizerState) -> None:
        """After the values are there: forget what was before, and take the groups' options."""
        if isinstance(self.optimizer, FlatOptimizer):
            for name, parameter in self.parameters.items():
                if name not in self.found:
                    self.optimizer.state.pop(parameter, None)
        else:
            self._load_all(decode(rest.values))
        for ours in self.optimizer.param_groups:
            first = self.names.get(id(ours["params"][0])) if ours["params"] else None
            for theirs in rest.groups:
                if first in theirs.names:
                    _take_options(ours, decode(theirs.options))

    def _load_all(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        order = [self.names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state = {at: {**self.found.get(name, {}), **values.get(name, {})} for at, name in enumerate(order)}
        shown = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**shown, "state": {at: found for at, found in state.items() if found}})


def _take_options(ours: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    for key, value in theirs.items():
        held = ours.get(key)
        if isinstance(held, torch.Tensor):
            held.fill_(value)
        elif key in ours and key != "params":
            ours[key] = tuple(value) if isinstance(held, tuple) else value


# --- torch's own state dicts, of whole tensors -----------------------------------------------------------------------


def whole_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state dict, of whole tensors on the host; all ranks must ask for it.

    Args:
        keep: False on ranks that only help to gather.
    """

    def taken(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        found = gathered(value)
        return found.cpu() if keep else None

    shown = optimizer.state_dict()
    state = {at: {key: taken(value) for key, value in states.items()} for at, states in shown["state"].items()}
    return {**shown, "state": state if keep else {}}


def place_optimizer_state(optimizer: Optimizer, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors, with those of a sharded parameter's shape laid out as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(at: int, key: str, value: Any) -> Any:
        parameter = parameters[at] if at < len(parameters) else None
        if not isinstance(value, torch.Tensor) or not isinstance(parameter, DTensor):
            return value
        target = like(parameter, value.dtype, tuple(value.shape), key)
        fill(target, value)
        return target

    state = {at: {key: placed(at, key, v) for key, v in states.items()} for at, states in whole["state"].items()}
    return {**whole, "state": state}
