"""State of a rank of a replica as a twin takes it over: shards, buffers, the optimizer's state, and what is named.

It goes as JSON, in which tensors are numbers of a list, and the bytes of these: no pickle, and equal to the last bit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zgraph.errors import StateDictError
from zgraph.optim.gradients import raw_bytes
from zgraph.optim.runs import like, local
from zgraph.runtime.between import Between
from zgraph.runtime.feedback import forget_rests

MOST_BYTES = 1 << 30
"""Of the JSON."""
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_KINDS = ("tensor", "like", "list", "tuple", "dict")


class Stateful(Protocol):
    """Anything with a state to hand on: a learning rate's schedule, a scaler."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Twins:
    """Hands this rank's state to twins, and takes it from one.

    Args:
        model: its shards and buffers.
        optimizer: of its parameters.
        state: what else there is, by name.
        rng: whether the generators of random numbers go along.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Stateful], rng: bool
    ) -> None:
        self.model, self.optimizer, self.state, self.rng = model, optimizer, dict(state), rng

    def check(self) -> None:
        """See whether the state could be sent: better now than when another joins.

        Raises:
            StateDictError: something in it is neither a tensor, nor plain data.
        """
        json.dumps(self._said([]))

    def _said(self, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """JSON of the state, and its tensors at the end of a list."""
        for one in self.state.values():
            one.state_dict()  # an engine's counts settle a step that the device left out, and change the others by it
        return {
            "held": pack([[name, tensor] for name, tensor in self._held()], tensors, "model"),
            "optimizer": pack(self.optimizer.state_dict(), tensors, "optimizer"),
            "state": {name: pack(one.state_dict(), tensors, name) for name, one in self.state.items()},
            "rng": pack(_rng() if self.rng else None, tensors, "rng"),
        }

    def send(self, between: Between, to: list[int], step: int) -> None:
        """Send the state to twins, each by its place in the group. Raises BrokenError, StateDictError."""
        tensors: list[torch.Tensor] = []
        said = {"step": step, **self._said(tensors)}
        said["tensors"] = [[str(t.dtype), list(t.shape)] for t in tensors]
        text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        for place in to:
            between.send(torch.tensor([text.numel()]), place)
            between.send(text, place)
        for tensor in tensors:
            raw = raw_bytes(tensor)
            for place in to if raw.numel() else ():
                between.send(raw, place)

    @torch.no_grad()
    def take(self, between: Between, source: int) -> int:
        """Take the state of a twin, by its place in the group; the step that comes next.

        Raises:
            StateDictError: it does not fit this rank. Nothing was loaded; where it is the optimizer that refuses it,
                nothing but a part of the optimizer's.
            BrokenError: it does not come.
        """
        length = torch.zeros(1, dtype=torch.int64)
        between.receive(length, source)
        if not 0 < int(length) <= MOST_BYTES:
            raise StateDictError(f"a twin's state of {int(length)} bytes is none; start all with the same zgraph")
        text = torch.empty(int(length), dtype=torch.uint8)
        between.receive(text, source)
        try:
            said = json.loads(text.numpy().tobytes())
            tensors = [torch.empty(shape, dtype=_DTYPES[dtype]) for dtype, shape in said["tensors"]]
            for tensor in tensors:
                if tensor.numel():
                    between.receive(raw_bytes(tensor), source)
            step, held, optimizer, rng = (unpack(said[key], tensors) for key in ("step", "held", "optimizer", "rng"))
            state = {name: _plain(unpack(one, tensors)) for name, one in said["state"].items()}
            self._check(held)
            self._check_optimizer(optimizer)
            if type(step) is not int or step < 0 or state.keys() != self.state.keys() or (self.rng and rng is None):
                raise ValueError(f"it has {[*state]} beside model and optimizer, and this rank {[*self.state]}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, RuntimeError) as error:
            raise StateDictError(f"a twin's state cannot be read ({error}); start all with the same zgraph") from None
        self._load_or_leave(optimizer, state, rng)
        for (_, own), (_, given) in zip(self._held(), held, strict=True):
            local(own).copy_(given.tensor)
        forget_rests(self.model)  # they are of gradients that this rank has made, of other weights
        return step

    def _load_or_leave(self, optimizer: Any, state: Mapping[str, Any], rng: Mapping[str, Given] | None) -> None:
        """Load what may refuse what it is given; if one does, the others have what they had. Raises StateDictError."""
        drawn = _rng()
        before = {name: copy.deepcopy(one.state_dict()) for name, one in self.state.items()}
        done: list[str] = []
        try:
            for name, one in self.state.items():
                done.append(f"state[{name!r}]")
                one.load_state_dict(state[name])
            done.append("rng")
            if rng is not None:
                _set_rng({key: one.tensor for key, one in rng.items()})
            done.append("the optimizer")
            self._load_optimizer(optimizer)
        except Exception as error:
            for (name, one), _ in zip(self.state.items(), done, strict=False):
                one.load_state_dict(before[name])
            _set_rng(drawn)
            raise StateDictError(
                f"{done[-1]} does not take a twin's state: {error!r}; start all with the same"
            ) from error

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _check(self, held: Any) -> None:
        own = [(name, tuple(local(tensor).shape), tensor.dtype) for name, tensor in self._held()]
        given = [(name, tuple(one.tensor.shape), one.tensor.dtype) for name, one in held]
        if own != given:
            differs = next(
                (pair for pair in zip(own, given, strict=False) if pair[0] != pair[1]), (len(own), len(given))
            )
            raise StateDictError(f"a twin has {differs[1]}, and this rank {differs[0]}; start all with the same model")

    def _check_optimizer(self, given: Any) -> None:
        """Raises ValueError and the like for what is no state of this optimizer."""
        own = [len(group["params"]) for group in self.optimizer.param_groups]
        if [len(group["params"]) for group in given["param_groups"]] != own:
            raise ValueError("its optimizer has other groups of parameters")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, one in given["state"].items():
            for key, value in one.items():
                shape = tuple(local(parameters[i]).shape)
                if isinstance(value, Given) and value.like and tuple(value.tensor.shape) != shape:
                    raise ValueError(f"{key} of parameter {i} is {tuple(value.tensor.shape)}, and the shard {shape}")

    def _load_optimizer(self, given: Any) -> None:
        """Load the optimizer's state: its structure as the optimizer does, and then the bits as they came."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states: dict[int, dict[str, Any]] = given["state"]
        placed = {i: {key: _placed(parameters[i], v) for key, v in one.items()} for i, one in states.items()}
        for parameter in [p for i, p in enumerate(parameters) if i not in states]:
            self.optimizer.state.pop(parameter, None)
        self.optimizer.load_state_dict({"state": placed, "param_groups": _plain(given["param_groups"])})
        for i, one in states.items():
            state = self.optimizer.state[parameters[i]]
            for key, value in one.items():
                if isinstance(value, Given):
                    _put(state, key, value.tensor, parameters[i])


class Given:
    """A tensor that was sent, and whether it was placed as its parameter is."""

    def __init__(self, tensor: torch.Tensor, like: bool) -> None:
        self.tensor, self.like = tensor, like


def _placed(parameter: torch.Tensor, value: Any) -> Any:
    if not isinstance(value, Given):
        return _plain(value)
    own = value.tensor.clone().to(parameter.device if value.like else "cpu")
    return like(parameter, own) if value.like else own


def _put(state: dict[str, Any], key: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    held = state.get(key)
    if isinstance(held, torch.Tensor) and local(held).shape == tensor.shape and held.dtype == tensor.dtype:
        local(held).copy_(tensor)
    else:
        state[key] = _placed(parameter, Given(tensor, isinstance(held, DTensor)))


def pack(value: Any, tensors: list[torch.Tensor], name: str) -> Any:
    """JSON of a state, with its tensors at the end of a list.

    Args:
        value: the state.
        tensors: to which those of it are added.
        name: of the state, for messages.

    Raises:
        StateDictError: something in it is neither a tensor, nor plain data.
    """
    if isinstance(value, torch.Tensor):
        if (held := local(value)).layout != torch.strided or held.is_quantized or held.is_meta:
            raise StateDictError(f"{name} has a {held.type()} tensor: replicas hand on dense ones")
        tensors.append(held)
        return {"like" if isinstance(value, DTensor) else "tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors, name), pack(one, tensors, name)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [pack(one, tensors, name) for one in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StateDictError(
        f"{name} has a {type(value).__name__} in its state, which replicas do not hand on: they take tensors, numbers, "
        "texts, and lists, tuples and dicts of them; leave it out of state=, or out of its state_dict"
    )


def unpack(found: Any, tensors: list[torch.Tensor]) -> Any:
    """The state that was packed, with tensors as `Given`. Raises ValueError or TypeError for what is none."""
    if not isinstance(found, dict):
        return found
    ((kind, value),) = found.items()
    if kind not in _KINDS:
        raise ValueError(f"{kind[:40]} is no kind of state")
    if kind in ("tensor", "like"):
        return Given(tensors[value], kind == "like")
    if kind == "dict":
        return {unpack(key, tensors): unpack(one, tensors) for key, one in value}
    parts = [unpack(one, tensors) for one in value]
    return parts if kind == "list" else tuple(parts)


def _plain(value: Any) -> Any:
    """The same with tensors as they are."""
    if isinstance(value, Given):
        return value.tensor
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return type(value)(_plain(one) for one in value) if isinstance(value, list | tuple) else value


def _rng() -> dict[str, torch.Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def _set_rng(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
