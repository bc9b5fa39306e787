"""What a checkpoint of an engine has: tensors by the names of parameters, and everything else as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from zgraph.engine.jsonable import decode, encode
from zgraph.engine.storage import Stored
from zgraph.errors import CheckpointError
from zgraph.ir.layout import chunk_rows
from zgraph.optim.flat import FlatOptimizer
from zgraph.optim.runs import local
from zgraph.runtime import torch_private

if TYPE_CHECKING:
    from zgraph.engine.engine import Engine

Tensors = dict[str, torch.Tensor]


class Group(BaseModel):
    """A group of an optimizer: the names of its parameters, and its options."""

    names: tuple[str, ...]
    options: dict[str, Any]


class State(BaseModel):
    """All that is not a tensor, and the same on all ranks.

    Args:
        values: of the optimizer's state, by the names of parameters, what is no tensor.
        buffers: the names of the model's tensors that are not parameters.
        dtype: what is computed in, where that is not the dtype of the masters.
        config: that of the run, for information.
        model_info: the model's own configuration, if it has one as those of transformers have.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())

    world_size: PositiveInt
    global_steps: NonNegativeInt
    micro_steps: NonNegativeInt
    skipped_steps: NonNegativeInt
    loss_scale: dict[str, int | float]
    scheduler: dict[str, Any] | None = None
    dataloader: dict[str, NonNegativeInt] | None = None
    groups: tuple[Group, ...] = ()
    values: dict[str, dict[str, Any]] = {}
    client_state: dict[str, Any] = {}
    buffers: tuple[str, ...] = ()
    dtype: Literal["float16", "bfloat16"] | None = None
    config: dict[str, Any] = {}
    model_info: dict[str, Any] | None = None


# --- what is saved ---------------------------------------------------------------------------------------------------


def model_tensors(module: nn.Module) -> Tensors:
    """Parameters and persistent buffers at rest by name; one that has several names under its first."""
    found: Tensors = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} in the model's state dict is no tensor: make it a buffer, or client_state")
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def parameter_names(module: nn.Module) -> dict[int, str]:
    """The name of each parameter, by its id."""
    return {id(tensor): name for name, tensor in model_tensors(module).items() if isinstance(tensor, nn.Parameter)}


def tensors_of(engine: Engine) -> Tensors:
    """All tensors of a checkpoint: `model.NAME`, and `optimizer.KEY.NAME`."""
    found = {f"model.{name}": tensor for name, tensor in model_tensors(engine.module).items()}
    for name, states in _states(engine):
        found |= {f"optimizer.{key}.{name}": s for key, s in states.items() if isinstance(s, torch.Tensor)}
    return found


def state_of(engine: Engine, client_state: Mapping[str, Any]) -> State:
    """The rest.

    Raises:
        CheckpointError: JSON cannot hold something; the error names the key.
    """
    scheduler, loader = engine.lr_scheduler, engine.training_dataloader
    values = {n: {k: s for k, s in states.items() if not isinstance(s, torch.Tensor)} for n, states in _states(engine)}
    config: Any = getattr(engine.module, "config", None)
    tensors = model_tensors(engine.module)
    return State(
        world_size=engine.config.world_size, global_steps=engine.global_steps, micro_steps=engine.micro_steps,
        skipped_steps=engine.skipped_steps, loss_scale=engine.loss_scaler.state_dict(),
        scheduler=encode(scheduler.state_dict(), "lr_scheduler") if scheduler is not None else None,
        dataloader=loader.state_dict() if loader is not None else None, groups=_groups(engine),
        values=encode({name: some for name, some in values.items() if some}, "optimizer.state"),
        client_state=encode(dict(client_state), "client_state"),
        buffers=tuple(name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)),
        dtype=engine.config.param_dtype, config=engine.config.keys.model_dump(mode="json"),
        model_info=config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
    )  # fmt: skip


def _states(engine: Engine) -> Iterable[tuple[str, dict[str, Any]]]:
    if engine.optimizer is None:
        return
    names = parameter_names(engine.module)
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            if states := engine.optimizer.state.get(parameter):
                yield names[id(parameter)], states


def _groups(engine: Engine) -> tuple[Group, ...]:
    if engine.optimizer is None:
        return ()
    names = parameter_names(engine.module)
    return tuple(
        Group(names=tuple(names[id(p)] for p in group["params"]), options=encode(_options(group), f"group {number}"))
        for number, group in enumerate(engine.optimizer.param_groups)
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in group.items() if key != "params"}
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


# --- what is loaded --------------------------------------------------------------------------------------------------


def model_targets(module: nn.Module, stored: Mapping[str, Stored], *, strict: bool) -> Tensors:
    """Where a checkpoint's values of the model go.

    Raises:
        CheckpointError: it does not fit the model.
    """
    wanted = {f"model.{name}": tensor for name, tensor in model_tensors(module).items()}
    given = {name for name in stored if name.startswith("model.")}
    problems = [
        f"{name[6:]} has shape {stored[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and stored[name].shape != tuple(tensor.shape)
    ]
    if strict:
        problems += [f"{name[6:]} is missing" for name in wanted if name not in given]
        problems += [f"{name[6:]} is not part of the model" for name in sorted(given - set(wanted))]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise CheckpointError(f"the checkpoint does not fit the model; nothing was loaded:\n  {shown}")
    return {name: tensor for name, tensor in wanted.items() if name in given}


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
                    key: _like(self.parameters[name], *stored[f"optimizer.{key}.{name}"]) for key in theirs
                }

    @property
    def targets(self) -> Tensors:
        """Where the values go, by the names that a checkpoint has for them."""
        return {f"optimizer.{k}.{name}": t for name, states in self.found.items() for k, t in states.items()}

    def finish(self, groups: Iterable[Group], values: Mapping[str, Mapping[str, Any]]) -> None:
        """After the values are there: forget what was before, and take the groups' options."""
        if isinstance(self.optimizer, FlatOptimizer):
            for name, parameter in self.parameters.items():
                if name not in self.found:
                    self.optimizer.state.pop(parameter, None)
        else:
            self._load_all(decode(dict(values)))
        for ours in self.optimizer.param_groups:
            first = self.names.get(id(ours["params"][0])) if ours["params"] else None
            for theirs in groups:
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


def _like(parameter: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for a state: placed as the parameter is if it is as large; on the host if it is one number."""
    if tuple(parameter.shape) == shape and shape:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=local(parameter).device if shape else "cpu")


def restore(engine: Engine, state: State, *, scheduler: bool, optimizer: bool) -> None:
    """Take what is not a tensor.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        if optimizer:
            engine.loss_scaler.load_state_dict(state.loss_scale)
        if scheduler and engine.lr_scheduler is not None and state.scheduler is not None:
            engine.lr_scheduler.load_state_dict(decode(state.scheduler))
        if engine.training_dataloader is not None and state.dataloader is not None:
            engine.training_dataloader.load_state_dict(state.dataloader)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the state of scheduler, loader or loss scale does not fit: {error!r}") from None
    engine.global_steps, engine.skipped_steps = state.global_steps, state.skipped_steps
    engine.micro_steps = state.micro_steps - state.micro_steps % engine.accumulation


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as they are now, on the host."""
    return {name: _with_local(tensor, lambda own: own.to("cpu", copy=True)) for name, tensor in tensors.items()}


@torch.no_grad()
def fill(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor, or this rank's part of it, to where it belongs."""
    held = local(target)
    if isinstance(target, DTensor) and isinstance(target.placements[-1], Shard):
        mesh = target.device_mesh
        start = mesh.get_local_rank(mesh.ndim - 1) * chunk_rows(whole.shape[0], mesh.size(mesh.ndim - 1))
        whole = whole[start : start + held.shape[0]]
    held.copy_(whole)


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of a tensor, on the host; every rank must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", dtype)
    device = tensor.device_mesh.device_type
    return _with_local(tensor, lambda own: own.to(device, dtype)).full_tensor().cpu()  # type: ignore[attr-defined,no-any-return]


def _with_local(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    own = change(local(tensor).detach())
    return torch_private.dtensor_like(own, tensor) if isinstance(tensor, DTensor) else own
