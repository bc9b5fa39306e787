"""Runs: neighbours in a flat buffer, with their states laid out as they are, so that one update serves all of them.

Gradients come as separate tensors. Those of small neighbours are copied side by side into a buffer of at most so
many bytes, which the next run uses again; a parameter as large as that is a run of its own, whose gradient stays where
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zgraph.bridge import private_runtime
from zgraph.errors import UsageError
from zgraph.ir.layout import chunk_rows, dense_strides
from zgraph.runtime.flat_buffers import align_numel
from zgraph.runtime.shards import ShardStore, Slot, slots_at_rest

MAX_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Of the parameters of a run that has several. On a processor, what was just copied is still in its cache."""

Make = Callable[[torch.Tensor, str], torch.Tensor]
"""Memory for a state, by the parameter's own and by its key."""


class Piece(NamedTuple):
    """Tensors that are updated at once: a parameter, its gradient, its states, and the copy to compute with."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: tuple[torch.Tensor, ...]
    copy: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.parameter, self.gradient, *self.states


@dataclass(eq=False)
class Run:
    """Neighbours, or one parameter alone.

    Args:
        parameters: in the order of memory.
        starts: where each begins in that memory, in elements.
        memory: that of all of them; None for one alone, whose own is looked up at each step.
        copy: what is computed with, in the same layout, where the update can write it.
        store: whose parameters these are, where what is computed with is another memory.
    """

    parameters: Sequence[torch.Tensor]
    starts: Sequence[int] = (0,)
    memory: torch.Tensor | None = None
    copy: torch.Tensor | None = None
    store: ShardStore | None = None
    _states: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)
    _gathered: tuple[torch.Tensor | None, list[torch.Tensor]] = (None, [])

    def __post_init__(self) -> None:
        self.steps = torch.zeros(len(self.parameters), dtype=torch.float32, device="cpu")
        self.step_views = self.steps.unbind()
        self.ends = [start + local(p).numel() for start, p in zip(self.starts, self.parameters, strict=True)]
        self._has_pads = any(end != start for end, start in zip(self.ends, self.starts[1:], strict=False))

    def states(self, key: str, make: Make) -> list[torch.Tensor]:
        """A state of each parameter, as the optimizer shows it."""
        if key not in self._states:
            if self.memory is None:
                (parameter,) = self.parameters
                whole = make(local(parameter), key)
                views = [whole]
            else:
                whole = torch.zeros_like(self.memory)
                views = self._views(whole)
            self._states[key] = whole, [like(p, v) for p, v in zip(self.parameters, views, strict=True)]
        return self._states[key][1]

    def piece(
        self, keys: Iterable[str], first: int, gradients: list[torch.Tensor], buffer: torch.Tensor | None
    ) -> Piece:
        """The neighbours from `first` on that have these gradients, which are copied to the buffer if there are more
        than one."""
        states = [self._states[key][0] for key in keys]
        if self.memory is None:
            parameter, (gradient,) = local(self.parameters[0]), gradients
            return Piece(parameter, _strided_as(gradient, parameter), tuple(states), self.copy)
        start, end = self.starts[first], self.ends[first + len(gradients) - 1]
        if len(gradients) == 1:
            gradient = gradients[0].reshape(-1)
        else:
            assert buffer is not None
            if self._gathered[0] is not buffer:
                self._gathered = buffer, self._views(buffer)
            gradient = buffer[start:end]
            if self._has_pads:
                gradient.zero_()
            torch._foreach_copy_(self._gathered[1][first : first + len(gradients)], gradients)
        copy = self.copy[start:end] if self.copy is not None else None
        return Piece(self.memory[start:end], gradient, tuple(s[start:end] for s in states), copy)

    def _views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        spans = zip(self.parameters, self.starts, self.ends, strict=True)
        return [whole[start:end].view(local(p).shape) for p, start, end in spans]


def lay_out(parameters: Iterable[torch.Tensor], in_place: Callable[[torch.Tensor], bool]) -> Iterator[Run]:
    """Runs of parameters: neighbours in the flat buffers of a compiled model together, all else alone.

    Args:
        parameters: of one group.
        in_place: whether a parameter is updated where it is, with its states beside it.
    """
    known = slots_at_rest()
    flat: list[tuple[ShardStore, Slot]] = []
    for parameter in parameters:
        store, slot = known.get(id(parameter), (None, None))
        if store is None or slot is None:
            yield Run([parameter])
        elif slot.is_sharded and in_place(parameter):
            flat.append((store, slot))
        else:
            copy = slot.beside if in_place(parameter) else None
            yield Run([parameter], copy=copy, store=store if _has_copy(slot) else None)
    flat.sort(key=lambda found: (_address(found[1].rest), _begin(found[1].rest)))
    first = 0
    for last, (one, other) in enumerate(pairwise([*flat, None])):
        assert one is not None
        if other is None or not _adjoin(one[1], other[1]) or _bytes(flat[first][1], other[1]) > _max_bytes(one[1]):
            yield _joined(flat[first][0], [slot for _, slot in flat[first : last + 1]])
            first = last + 1


def _joined(store: ShardStore, slots: list[Slot]) -> Run:
    first, last = slots[0], slots[-1]
    begin, numel = _begin(first.rest), _end(last.rest) - _begin(first.rest)
    copy = _over(first.beside, numel) if first.beside is not None else None
    return Run(
        [slot.parameter for slot in slots],
        [_begin(slot.rest) - begin for slot in slots],
        _over(first.rest, numel),
        copy,
        store if _has_copy(last) else None,
    )


def _over(first: torch.Tensor, numel: int) -> torch.Tensor:
    return first.as_strided((numel,), (1,), first.storage_offset())


def _adjoin(one: Slot, other: Slot) -> bool:
    """Whether there is nothing but a pad between the two, and their copies have the same layout."""
    gap = _begin(other.rest) - _end(one.rest)
    copies = [s.working if s.beside is None else s.beside for s in (one, other)]
    are_alike = _begin(copies[1]) - _end(copies[0]) == gap and one.rest.dtype == other.rest.dtype
    together = _address(one.rest) == _address(other.rest) and _address(copies[0]) == _address(copies[1])
    return together and are_alike and 0 <= gap < align_numel(copies[0].dtype)


def _has_copy(slot: Slot) -> bool:
    return slot.working is not slot.rest


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _begin(chunk: torch.Tensor) -> int:
    return int(chunk.storage_offset())


def _end(chunk: torch.Tensor) -> int:
    return _begin(chunk) + chunk.numel()


def _bytes(first: Slot, last: Slot) -> int:
    return (_end(last.rest) - _begin(first.rest)) * first.rest.element_size()


def _max_bytes(slot: Slot) -> int:
    return MAX_BYTES.get(slot.rest.device.type, MAX_BYTES["cuda"])


def _strided_as(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient, laid out as the parameter is: torch's fused kernels go through memory."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of it.

    Raises:
        UsageError: it is sparse.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise UsageError(f"gradients must be dense, not {gradient.layout}; build the embedding with sparse=False")
    return local(gradient)


def local(tensor: Any) -> torch.Tensor:
    """This rank's part."""
    found: torch.Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()
    return found


def like(parameter: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """This rank's part as a tensor of the parameter's kind, with as many rows."""
    if not isinstance(parameter, DTensor):
        return own
    if own.shape == local(parameter).shape:
        return private_runtime.dtensor_like(own, parameter)
    shape = torch.Size((parameter.shape[0], *own.shape[1:]))
    return private_runtime.dtensor(own, parameter.device_mesh, parameter.placements, shape, dense_strides(shape))


def saved_states(optimizer: Optimizer, state_dict: Any) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with the state that was saved of it, in the dtypes in which it was saved; empty if none was."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    ours = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(saved, ours, strict=True):
        yield parameter, state_dict["state"].get(number, {})


def first_row(parameter: torch.Tensor) -> int:
    """The number of this rank's first row.

    Raises:
        UsageError: it is sharded in another way than by its rows along the last axis of its mesh.
    """
    if not isinstance(parameter, DTensor) or not any(p.is_shard() for p in parameter.placements):
        return 0
    *others, last = parameter.placements
    if not last.is_shard(0) or any(p.is_shard() for p in others):
        raise UsageError(f"a parameter has placements {parameter.placements}: shard it by zgraph.compile")
    mesh = parameter.device_mesh
    rows = parameter.shape[0]
    return min(mesh.get_local_rank(mesh.ndim - 1) * chunk_rows(rows, mesh.size(mesh.ndim - 1)), rows)
