"""`deepspeed.utils`: whole or local masters, gradients and optimizer states of parameters; logs, and loaders.

A parameter is one of `engine.module.named_parameters()`. Functions with `full` in their names are called by all ranks,
together. Gradients are there from `engine.backward` to `engine.step`: averaged over the ranks, and under fp16 times the
loss scale. States are there from the first step on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_runtime
from zgraph.deepspeed.absent import finder
from zgraph.engine.checkpoint.tensors import fill, gathered
from zgraph.engine.registry import Home, home_of
from zgraph.errors import UsageError
from zgraph.optim.runs import local
from zgraph.runtime.gradients import reduced
from zgraph.runtime.shards import settle_host_memory

logger = logging.getLogger("zgraph")

_LEAVES = "leave it out: modules are not gathered as such, and no hook needs to know of them"

__getattr__ = finder(
    __name__,
    {
        "OnDevice": 'build the model under torch.device("meta")',
        "set_log_level_from_string": 'call logging.getLogger("zgraph").setLevel',
        "instrument_w_nvtx": "call torch.profiler.record_function",
        "safe_update_full_grad_vectorized": "call safe_get_full_grad and safe_set_full_grad for each parameter",
        "groups": "there is one group: zgraph.deepspeed.comm.get_world_group()",
        **dict.fromkeys(
            (
                "set_z3_leaf_modules",
                "set_z3_leaf_module",
                "unset_z3_leaf_modules",
                "get_z3_leaf_modules",
                "z3_leaf_module",
                "z3_leaf_parameter",
                "set_z3_leaf_modules_by_name",
                "set_z3_leaf_modules_by_suffix",
            ),
            _LEAVES,
        ),
    },
)


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log a line on some ranks; on all, where none or -1 is among them."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[rank %d] %s", rank, message)


class RepeatingLoader:
    """Iterator over a loader that begins anew when the loader ends."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)


# --- masters ---------------------------------------------------------------------------------------------------------


def safe_get_full_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """The whole master of a parameter, as a copy in fp32.

    Raises:
        UsageError: it is no parameter of an engine.
    """
    home_of(param)
    return _whole(param)


def safe_set_full_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Take a whole tensor as the master of a parameter.

    Raises:
        UsageError: it is no parameter of an engine, or of another shape.
    """
    home_of(param)
    _set(param, value)
    private_runtime.bump_version([param])


def safe_get_local_fp32_param(param: torch.Tensor) -> torch.Tensor:
    """The rows of a master that this rank has, as a copy in fp32.

    Raises:
        UsageError: it is no parameter of an engine.
    """
    home_of(param)
    return _own(param)


def safe_set_local_fp32_param(param: torch.Tensor, value: torch.Tensor) -> None:
    """Take a tensor as the rows of a master that this rank has.

    Raises:
        UsageError: it is no parameter of an engine, or of another shape.
    """
    home_of(param)
    _set_own(param, value)
    private_runtime.bump_version([param])


# --- gradients -------------------------------------------------------------------------------------------------------


def safe_get_full_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The whole gradient of a parameter, as a copy in fp32; None where it has none.

    Raises:
        UsageError: it is no parameter of an engine.
    """
    gradient = _gradient(home_of(param))
    return None if gradient is None else _whole(gradient)


def safe_set_full_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Take a whole tensor as the gradient of a parameter.

    Raises:
        UsageError: it is no parameter of an engine, has no gradient, or is of another shape.
    """
    _set(_own_gradient(param), value)


def safe_get_local_grad(param: torch.Tensor) -> torch.Tensor | None:
    """The rows of a gradient that this rank has, as a copy in fp32; None where there is none. All ranks call it.

    Raises:
        UsageError: it is no parameter of an engine.
    """
    gradient = _gradient(home_of(param))
    return None if gradient is None else _own(gradient)


def safe_set_local_grad(param: torch.Tensor, value: torch.Tensor) -> None:
    """Take a tensor as the rows of a gradient that this rank has. All ranks call it.

    Raises:
        UsageError: it is no parameter of an engine, has no gradient, or is of another shape.
    """
    _set_own(_own_gradient(param), value)


@torch.no_grad()
def _gradient(home: Home) -> torch.Tensor | None:
    """The gradient, laid out as the parameter is, and reduced: within an accumulation it may not have been."""
    own, parameter = reduced(home.session, home.slot), home.slot.parameter
    return private_runtime.dtensor_like(own, parameter) if own is not None and isinstance(parameter, DTensor) else own


def _own_gradient(param: torch.Tensor) -> torch.Tensor:
    """The gradient, in the parameter's `.grad`."""
    home = home_of(param)
    gradient = _gradient(home)
    if gradient is None:
        raise UsageError("the parameter has no gradient: call engine.backward first")
    param.grad, home.slot.holds_unreduced = gradient, False
    return gradient


# --- states of the optimizer -----------------------------------------------------------------------------------------


def safe_get_full_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """A whole state of a parameter ("exp_avg", say), as a copy in fp32; None before the first step.

    Raises:
        UsageError: it is no parameter of an engine, or its optimizer has no such state.
    """
    state = _state(param, optim_state_key)
    return None if state is None else _whole(state)


def safe_set_full_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Take a whole tensor as a state of a parameter.

    Raises:
        UsageError: it is no parameter of an engine, its optimizer has no such state, or the shape is another.
    """
    _set(_needed_state(param, optim_state_key), value)


def safe_get_local_optimizer_state(param: torch.Tensor, optim_state_key: str) -> torch.Tensor | None:
    """The rows of a state that this rank has, as a copy in fp32; None before the first step.

    Raises:
        UsageError: it is no parameter of an engine, or its optimizer has no such state.
    """
    state = _state(param, optim_state_key)
    return None if state is None else _own(state)


def safe_set_local_optimizer_state(param: torch.Tensor, value: torch.Tensor, optim_state_key: str) -> None:
    """Take a tensor as the rows of a state that this rank has.

    Raises:
        UsageError: it is no parameter of an engine, its optimizer has no such state, or the shape is another.
    """
    _set_own(_needed_state(param, optim_state_key), value)


def _state(param: torch.Tensor, key: str) -> torch.Tensor | None:
    optimizer = home_of(param).engine.optimizer
    states = optimizer.state.get(param) if optimizer is not None else None
    if not states:
        return None
    if not isinstance(states.get(key), torch.Tensor):
        raise UsageError(f"the optimizer has no state {key!r} of it; those are {', '.join(states)}")
    found: torch.Tensor = states[key]
    return found


def _needed_state(param: torch.Tensor, key: str) -> torch.Tensor:
    state = _state(param, key)
    if state is None:
        raise UsageError("the optimizer has no state of the parameter yet: take a step first")
    return state


# --- whole and local -------------------------------------------------------------------------------------------------


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    found = gathered(tensor, torch.float32)
    return found.clone() if found.data_ptr() == local(tensor).data_ptr() else found


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor).to(torch.float32, copy=True)


def _set(tensor: torch.Tensor, value: torch.Tensor) -> None:
    _check_shape(tensor.shape, value)
    fill(tensor, value)


@torch.no_grad()
def _set_own(tensor: torch.Tensor, value: torch.Tensor) -> None:
    own = local(tensor)
    _check_shape(own.shape, value)
    settle_host_memory()
    own.copy_(value)


def _check_shape(shape: torch.Size, value: torch.Tensor) -> None:
    if value.shape != shape:
        raise UsageError(f"the value must have the shape {tuple(shape)}, not {tuple(value.shape)}")
