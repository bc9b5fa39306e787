"""Base of all optimizers here: states in runs, gradients side by side, one update a run."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import FROM_TORCH
from zgraph.codegen.fallback import has_failed
from zgraph.codegen.kernels import can_launch, launch
from zgraph.codegen.spec import KernelSpec
from zgraph.errors import UsageError
from zgraph.optim.runs import Piece, Run, gradient_of, lay_out, local
from zgraph.runtime.shards import ShardStore

Kernels = Literal["aten", "triton"]
Group = dict[str, Any]

COLUMNS = 1024
"""A kernel sees a piece as rows of so many numbers, and what is left as rows of one."""


class FlatOptimizer(Optimizer):
    """An optimizer that updates neighbours in a flat buffer as one.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain.
        defaults: the options of a group.
        kernels: "aten" updates with torch's own kernels; "triton" with one generated kernel on GPUs, which writes the
            copies to compute with in the same pass.

    Raises:
        UsageError: `kernels` means nothing.
    """

    def __init__(self, params: ParamsT, defaults: Group, kernels: Kernels) -> None:
        if kernels not in ("aten", "triton"):
            raise UsageError(f'kernels must be "aten" or "triton", not {kernels!r}')
        super().__init__(params, defaults)
        self.kernels = kernels
        self._runs: list[Run] = []
        self._places: dict[torch.Tensor, tuple[Run, int]] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    # --- what each optimizer says of itself ----------------------------------------------------------------------

    @abstractmethod
    def _keys(self, group: Group) -> tuple[str, ...]:
        """The names of the states that are as large as the parameter."""

    @abstractmethod
    def _aten(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        """Update pieces of the same age, dtype and device with torch's own kernels."""

    @abstractmethod
    def _spec(self, group: Group, columns: int, parameter: str, gradient: str, copy: str) -> KernelSpec:
        """The kernel that updates."""

    @abstractmethod
    def _scalars(self, group: Group, age: float) -> tuple[float, ...]:
        """Numbers that the kernel reads beside the piece."""

    def _ages(self, run: Run, indices: list[int], are_new: list[bool]) -> list[float]:
        """Age of each of these parameters, for the update: parameters of different ages are updated apart."""
        return [0.0] * len(indices)

    def _in_place(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is updated where it is, with states of torch's memory beside it."""
        return True

    def _make(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        """Memory for a state of a parameter that is alone in its run, not initialised."""
        return torch.empty_like(parameter)

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameters in due:
            self._lay_out(parameters)
        with ExitStack() as stack:
            for store in self._stores_in_step():
                stack.enter_context(store.copies.kept())
            self._update_all(due)
            for parameters in due:
                private_runtime.bump_version(parameters)
        return loss

    def _update_all(self, due: Sequence[list[torch.Tensor]]) -> None:
        """Update the parameters of each group that have a gradient."""
        for group, parameters in zip(self.param_groups, due, strict=True):
            self._update_group(group, parameters)

    def _lay_out(self, parameters: list[torch.Tensor]) -> None:
        """Give parameters that have a gradient for the first time their places in runs."""
        if new := [p for p in parameters if p not in self._places]:
            for run in lay_out(new, self._in_place):
                self._runs.append(run)
                self._places.update((p, (run, index)) for index, p in enumerate(run.parameters))
                if len(run.parameters) > 1:
                    self._reserve(run)

    def _reserve(self, run: Run) -> None:
        """Make the buffer that gradients are copied to large enough."""
        assert run.memory is not None
        held = self._buffers.get((run.memory.device, run.memory.dtype))
        if held is None or held.numel() < run.memory.numel():
            self._buffers[run.memory.device, run.memory.dtype] = torch.zeros_like(run.memory)

    def _stores_in_step(self) -> list[ShardStore]:
        """The stores all of whose copies that are out of date after this step are written in it."""
        missed = {run.store for run in self._runs if run.copy is None}
        return [store for store in {run.store for run in self._runs} - missed if store is not None]

    def _update_group(self, group: Group, parameters: list[torch.Tensor]) -> None:
        keys = self._keys(group)
        found: dict[Run, list[tuple[int, bool]]] = defaultdict(list)
        for parameter in parameters:
            run, index = self._places[parameter]
            found[run].append((index, self._admit(parameter, run, index, keys)))
        alone: dict[Any, list[Piece]] = defaultdict(list)
        for run, members in found.items():
            members.sort()
            indices = [index for index, _ in members]
            ages = self._ages(run, indices, [is_new for _, is_new in members])
            for age, piece in self._pieces(run, indices, ages, keys):
                if run.memory is None:
                    alone[age, piece.parameter.device, piece.parameter.dtype].append(piece)
                else:
                    self._update(group, age, [piece])
        for (age, _, _), pieces in alone.items():
            self._update(group, age, pieces)

    def _pieces(
        self, run: Run, indices: list[int], ages: list[float], keys: tuple[str, ...]
    ) -> Iterator[tuple[float, Piece]]:
        """Neighbours of one age. The buffer of gradients is used again for the next piece."""
        buffer = self._buffers.get((run.memory.device, run.memory.dtype)) if run.memory is not None else None
        first = 0
        for at, index in enumerate(indices):
            if at + 1 == len(indices) or indices[at + 1] != index + 1 or ages[at + 1] != ages[at]:
                gradients = [gradient_of(run.parameters[i]) for i in indices[first : at + 1]]
                yield ages[at], run.piece(keys, indices[first], gradients, buffer)
                first = at + 1

    def _update(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        """Update pieces of the same age, dtype and device, and their copies."""
        rest: list[Piece] = []
        fused: list[Piece] = []
        for piece in pieces:
            (fused if self.kernels == "triton" and self._takes_kernel(group, piece) else rest).append(piece)
        if rest:
            self._aten(group, age, rest)
            for piece in rest:
                if piece.copy is not None:
                    piece.copy.copy_(piece.parameter)
        if fused:
            scalars = [torch.full((), s, device=fused[0].parameter.device) for s in self._scalars(group, age)]
            for piece in fused:
                self._launch(group, piece, scalars)

    def _launch(self, group: Group, piece: Piece, scalars: list[torch.Tensor]) -> None:
        """Update a piece, and its copy in the same pass, by the generated kernel."""
        outs = [piece.parameter, *piece.states, *([piece.copy] if piece.copy is not None else [])]
        whole = piece.parameter.numel() // COLUMNS * COLUMNS
        for columns, part in ((COLUMNS, slice(None, whole)), (1, slice(whole, None))):
            reads, writes = ([t.view(-1)[part] for t in tensors] for tensors in (piece.tensors, outs))
            if num_rows := reads[0].numel() // columns:
                launch(self._spec_of(group, columns, piece), [*reads, *scalars], num_rows, writes)

    def _spec_of(self, group: Group, columns: int, piece: Piece) -> KernelSpec:
        """The kernel that updates rows of a piece."""
        parameter, gradient = (FROM_TORCH[t.dtype].value for t in (piece.parameter, piece.gradient))
        copy = FROM_TORCH[piece.copy.dtype].value if piece.copy is not None else ""
        return self._spec(group, columns, parameter, gradient, copy)

    def _takes_kernel(self, group: Group, piece: Piece) -> bool:
        """Whether a kernel can update a piece, and none like it has failed."""
        dense = all(t.is_contiguous() for t in (*piece.tensors, *([piece.copy] if piece.copy is not None else [])))
        if not dense or not can_launch(piece.parameter.device):
            return False
        return not any(has_failed(self._spec_of(group, columns, piece)) for columns in (COLUMNS, 1))

    # --- states --------------------------------------------------------------------------------------------------

    def _admit(self, parameter: torch.Tensor, run: Run, index: int, keys: tuple[str, ...]) -> bool:
        """Have the parameter's states lie in its run, whatever was put there instead; whether it had none."""
        state = self.state[parameter]
        is_new = True
        for key in keys:
            home, held = run.states(key, self._make)[index], state.get(key)
            is_new = is_new and held is None
            if held is not home:
                self._settle(state, key, held, home)
        return is_new

    def _settle(self, state: Group, key: str, held: Any, home: torch.Tensor) -> None:
        if held is None:
            local(home).zero_()
        else:
            local(home).copy_(local(torch.as_tensor(held)))
        state[key] = home

    @torch.no_grad()
    def give_states(self, parameters: Iterable[torch.Tensor]) -> None:
        """Have these parameters' states lie where a step would put them: zeros, where there were none."""
        wanted = set(parameters)
        for group in self.param_groups:
            members = [p for p in group["params"] if p in wanted]
            self._lay_out(members)
            for parameter in members:
                run, index = self._places[parameter]
                self._admit(parameter, run, index, self._keys(group))

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's; the states go where this optimizer keeps them."""
        super().load_state_dict(state_dict)
        self.give_states(p for group in self.param_groups for p in group["params"] if self.state.get(p))


def check_numbers(numbers: Mapping[str, float], decays: Mapping[str, float]) -> None:
    """Refuse numbers below 0 and decays outside 0 to 1. Raises UsageError."""
    if bad := [f"{name}={value}" for name, value in numbers.items() if not 0 <= value < math.inf]:
        raise UsageError(f"{', '.join(numbers)} must be 0 or more, not {', '.join(bad)}")
    if bad := [f"{name}={value}" for name, value in decays.items() if not 0 <= value < 1]:
        raise UsageError(f"{', '.join(decays)} must be from 0 to below 1, not {', '.join(bad)}")
