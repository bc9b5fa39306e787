"""State of a rank of a replica as a twin takes it over: shards, buffers, the optimizer's state, and what is named.

It goes as JSON, in which tensors are numbers of a list, and the bytes of these: no pickle, and equal to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zgraph.errors import StateDictError
from zgraph.optim.runs import like, local
from zgraph.runtime.between import Between

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

    def send(self, between: Between, to: list[int], step: int) -> None:
        """Send the state to twins, each by its place in the group. Raises BrokenError, StateDictError."""
        tensors: list[torch.Tensor] = []
        said = {
            "step": step,
            "held": pack([[name, tensor] for name, tensor in self._held()], tensors),
            "optimizer": pack(self.optimizer.state_dict(), tensors),
            "state": pack({name: one.state_dict() for name, one in self.state.items()}, tensors),
            "rng": pack(_rng() if self.rng else None, tensors),
        }
        said["tensors"] = [[str(t.dtype), list(t.shape)] for t in tensors]
        text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        for place in to:
            between.send(torch.tensor([text.numel()]), place)
            between.send(text, place)
        for tensor in tensors:
            raw = _bytes(tensor)
            for place in to if raw.numel() else ():
                between.send(raw, place)

    @torch.no_grad()
    def take(self, between: Between, source: int) -> int:
        """Take the state of a twin, by its place in the group; the step that comes next.

        Raises:
            StateDictError: it does not fit this rank. Nothing was loaded.
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
                    between.receive(_bytes(tensor), source)
            held = unpack(said["held"], tensors)
            self._check(held)
            step = int(said["step"])
            optimizer, state, rng = (unpack(said[key], tensors) for key in ("optimizer", "state", "rng"))
        except (KeyError, TypeError, ValueError, IndexError, RecursionError, RuntimeError) as error:
            raise StateDictError(f"a twin's state cannot be read ({error}); start all with the same zgraph") from None
        for (_, own), (_, given) in zip(self._held(), held, strict=True):
            local(own).copy_(given.tensor)
        self._load_optimizer(optimizer)
        for name, one in self.state.items():
            one.load_state_dict(_plain(state[name]))
        if rng is not None:
            _set_rng(rng)
        return step

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


def pack(value: Any, tensors: list[torch.Tensor]) -> Any:
    """JSON of a state, with its tensors at the end of a list.

    Raises:
        StateDictError: something in it is neither a tensor, nor plain data.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(local(value))
        return {"like" if isinstance(value, DTensor) else "tensor": len(tensors) - 1}
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [pack(one, tensors) for one in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StateDictError(f"a state that replicas hand on has a {type(value).__name__}: leave it out of state=")


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


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, [numbers times their size] on the host; one memory where it is there already."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _rng() -> dict[str, torch.Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def _set_rng(state: Mapping[str, Given]) -> None:
    torch.set_rng_state(state["cpu"].tensor)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].tensor)
