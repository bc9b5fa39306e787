"""Calls with inputs of any length, padded to a few that are captured once each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from zgraph.errors import UsageError
from zgraph.options.lengths import Lengths
from zgraph.runtime import Session


def bucketed(model: nn.Module, forward: Callable[..., Any], session: Session, lengths: Lengths) -> Callable[..., Any]:
    """`forward`, whose inputs are padded to the next of `lengths` and whose outputs are cut back.

    In the first call of each of training and evaluation the ranks take the largest of their lengths together, as they
    compare their first graphs. Later each rank takes its own.

    The result raises, before anything runs on this rank:
        UsageError: an input is too long, has no value to be padded with, or is not there.
    """
    signature = inspect.signature(forward)
    met: set[tuple[bool, bool]] = set()

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return forward(*args, **kwargs)  # which says what is wrong
        mode = (model.training, torch.is_grad_enabled())
        try:
            given = {**bound.arguments, **_extra(bound)}
            length = _length(given, lengths)
            size = lengths.size_for(length)
            if mode not in met and not session.is_alone:
                what = f"length, {'training' if mode[0] else 'evaluation'}, {mode[1]}"
                size = max(session.peers.exchange_values(what, size))
        except BaseException as error:
            session.fail(error)
            raise
        met.add(mode)
        for name, value in lengths.pad.items():
            if value is not None and given.get(name) is not None:
                _put(bound, name, _padded(given[name], size, lengths.dim, value))
        result = forward(*bound.args, **bound.kwargs)
        try:
            return _cut(result, length, size, lengths)
        except BaseException as error:
            session.fail(error)
            raise

    return call


def _extra(bound: inspect.BoundArguments) -> Mapping[str, Any]:
    """Keywords that a forward takes in its `**kwargs`."""
    return next((bound.arguments[n] for n, p in bound.signature.parameters.items() if _takes_rest(p, bound)), {})


def _takes_rest(parameter: inspect.Parameter, bound: inspect.BoundArguments) -> bool:
    return parameter.kind is parameter.VAR_KEYWORD and parameter.name in bound.arguments


def _put(bound: inspect.BoundArguments, name: str, value: torch.Tensor) -> None:
    if name in bound.arguments:
        bound.arguments[name] = value
        return
    for parameter in bound.signature.parameters.values():
        if _takes_rest(parameter, bound):
            bound.arguments[parameter.name] = {**bound.arguments[parameter.name], name: value}


def _length(given: Mapping[str, Any], lengths: Lengths) -> int:
    """The length of what is given. Raises UsageError where it has several, or none."""
    dim, found = lengths.dim, {}
    for name, value in lengths.pad.items():
        if value is None:
            continue
        tensor = given.get(name)
        if tensor is None and name not in lengths.optional:
            raise UsageError(
                f"lengths pads {name}, which this call leaves out; pass it, or name it in Lengths(optional=...) if the "
                "model computes the same without it when others are padded"
            )
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dim() <= dim:
            raise UsageError(f"lengths pads {name} along dimension {dim}, which it does not have; leave it out of pad")
        found[name] = tensor.shape[dim]
    if len({*found.values()}) != 1:
        said = ", ".join(f"{name} of {size}" for name, size in found.items()) or "none of them"
        raise UsageError(f"the inputs that lengths pads must be there and equally long, but this call has {said}")
    length = next(iter(found.values()))
    for name, tensor in given.items():
        if name not in lengths.pad and isinstance(tensor, torch.Tensor) and tensor.dim() > dim:
            if tensor.shape[dim] == length:
                raise UsageError(
                    f"{name} is as long as what lengths pads, but has no value to be padded with; add it to pad, with "
                    "None if its size is no length"
                )
    return length


def _padded(tensor: torch.Tensor, size: int, dim: int, value: float) -> torch.Tensor:
    behind = tensor.dim() - 1 - dim
    return F.pad(tensor, (*[0, 0] * behind, 0, size - tensor.shape[dim]), value=value)


def _entries(result: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(result, Mapping):
        yield from result.items()
    elif isinstance(result, tuple | list):
        yield from enumerate(result)
    else:
        yield 0, result


def _cut(result: Any, length: int, size: int, lengths: Lengths) -> Any:
    """The output with its entries cut back.

    Raises:
        UsageError: an entry is as long as the padded inputs, and nothing is said of it.
    """
    if length == size:
        return result
    made: dict[str | int, Any] = {}
    for key, value in _entries(result):
        if key in lengths.keep:
            continue
        if key in lengths.cut:
            made[key] = _shortened(value, length, size, lengths.dim)
        elif _is_long(value, size, lengths.dim):
            raise UsageError(
                f"the output's {key!r} is as long as the padded inputs; name it in Lengths(cut=...) to have it cut "
                "back, or in keep=... to leave it"
            )
    if isinstance(result, Mapping):
        for key, value in made.items():
            result[key] = value  # type: ignore[index]
        return result
    if isinstance(result, tuple | list):
        whole = [made.get(index, value) for index, value in enumerate(result)]
        return type(result)(*whole) if hasattr(result, "_fields") else type(result)(whole)
    return made.get(0, result)


def _shortened(value: Any, length: int, size: int, dim: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_shortened(v, length, size, dim) for v in value)
    return value.narrow(dim, 0, length) if _is_long(value, size, dim) else value


def _is_long(value: Any, size: int, dim: int) -> bool:
    """Whether a tensor, or one within, has the padded length."""
    if isinstance(value, tuple | list):
        return any(_is_long(v, size, dim) for v in value)
    return isinstance(value, torch.Tensor) and value.dim() > dim and value.shape[dim] == size
