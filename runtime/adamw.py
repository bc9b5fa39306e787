"""AdamW whose state may lie on the host or on disk, and whose update runs there or streams through the device.

The arithmetic is torch's fused kernel, which is vectorised on processors and one launch on GPUs (Loshchilov, Hutter:
"Decoupled weight decay regularization", 2019). Streamed, a chunk of the state is brought to the device while the one
before it is updated, and the one before that is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from zgraph.config import ranks_here
from zgraph.errors import UsageError
from zgraph.runtime import torch_private
from zgraph.runtime.disk import Access, DiskFile
from zgraph.runtime.host import PAGE_BYTES, Copy, HostMemory, available_bytes

Place = Literal["auto", "host", "disk"]
Update = Literal["auto", "device", "host"]

_MOMENTS = ("exp_avg", "exp_avg_sq")

NUM_LEAVING = 6
"""Copies back that may be under way: those of two pieces."""


class AdamW(Optimizer):
    """AdamW over local shards, as `torch.optim.AdamW(fused=True)` does it, to the last bit.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain.
        lr: the learning rate.
        betas: the decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        state: where the two moments lie: "auto" where the parameter does, "host", or "disk".
        update: where the step is computed: "host" or "device"; "auto" takes the host for parameters that lie there. On
            the device, what lies elsewhere streams through it.
        folder: for `state="disk"`: where the files go. They vanish with the process.
        access: for `state="disk"`: "direct" streams past the page cache, "mapped" leaves to it what stays in memory;
            "auto" is direct where that is more than a tenth of the free memory, and the file system can.
        chunk_bytes: how much of a tensor is streamed at once, rounded down to whole pages.

    Raises:
        UsageError: an argument means nothing.
        OffloadError: the host or the disk has no room for the state, or the folder is not writable; nothing is left
            behind.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, state: Place = "auto", update: Update = "auto", folder: str | Path | None = None,
        access: Access = "auto", chunk_bytes: int = 64 << 20,
    ) -> None:  # fmt: skip
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas) or chunk_bytes < 1:
            raise UsageError(
                "lr, eps and weight_decay must be 0 or more, betas from 0 to below 1, chunk_bytes positive"
            )
        if state not in ("auto", "host", "disk") or update not in ("auto", "device", "host"):
            raise UsageError('state must be "auto", "host" or "disk", and update "auto", "device" or "host"')
        if (state == "disk") != (folder is not None):
            raise UsageError('folder= says where state="disk" keeps its files: give both, or neither')
        if access not in ("auto", "mapped", "direct") or (access != "auto" and folder is None):
            raise UsageError('access must be "auto", "mapped" or "direct", the last two with state="disk"')
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.place, self.update_on, self.chunk_bytes = state, update, chunk_bytes
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._device = next((_local(p).device for p in parameters if _local(p).is_cuda), _compute_device())
        self._host = HostMemory(self._device)
        num_bytes = sum(2 * _num_bytes(_local(p)) for p in parameters if p.requires_grad)
        if state == "host":
            self._host.require(num_bytes, "AdamW's moments")
        self._disk: DiskFile | None = None
        if folder is not None:
            free_bytes = available_bytes() // max(ranks_here(), 1)
            self._disk = DiskFile(Path(folder), num_bytes, 2 * len(parameters), access, free_bytes)
        self._homes: dict[tuple[torch.Tensor, str], torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            streamed: list[_Piece] = []
            for parameter in parameters:
                piece = self._prepare(parameter)
                if self._runs_in_place(piece):
                    piece.update(group)
                else:
                    streamed.append(piece)
            self._stream(group, streamed)
            for parameter in parameters:
                torch_private.bump_version(parameter)
        return loss

    def _prepare(self, parameter: nn.Parameter) -> _Piece:
        """The parameter's tensors, the state made at its first step; one step more."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in _MOMENTS:
                state[key] = _like(parameter, self._home(parameter, key).zero_())
        state["step"] = state["step"] + 1  # a state dict may share the tensor
        assert parameter.grad is not None
        first, second = (_local(state[key]) for key in _MOMENTS)
        return _Piece(_local(parameter), _local(parameter.grad), first, second, state["step"])

    def _home(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        """Memory for this rank's part of a moment: the same each time where it is not torch's."""
        like = _local(parameter)
        if self.place == "auto":
            return torch.empty_like(like)
        if (parameter, key) not in self._homes:
            made = self._disk.zeros(like) if self._disk else self._host.pool.empty(like.size(), like.dtype)
            self._homes[parameter, key] = made
        return self._homes[parameter, key]

    @property
    def _part_bytes(self) -> int:
        """What is streamed at once: whole pages, as the disk asks for and as vectors of torch's kernel begin."""
        return max(self.chunk_bytes // PAGE_BYTES, 1) * PAGE_BYTES

    @property
    def _streams_disk(self) -> bool:
        return self._disk is not None and self._disk.is_direct

    def _runs_on_host(self, piece: _Piece) -> bool:
        if self.update_on == "host" and piece.parameter.is_cuda:
            raise UsageError('update="host" needs parameters on the host: zgraph.compile(..., offload="optimizer")')
        return self.update_on == "host" or (self.update_on == "auto" and not piece.parameter.is_cuda)

    def _runs_in_place(self, piece: _Piece) -> bool:
        """Whether a parameter is updated where all of it lies, without a copy."""
        if self._runs_on_host(piece):
            return not self._streams_disk
        return self.place == "auto" and piece.parameter.device == self._device

    def _stream(self, group: dict[str, Any], pieces: list[_Piece]) -> None:
        """Update on the device what lies elsewhere: the next piece is brought while one is updated."""
        disk = self._disk if self._streams_disk else None
        waiting: list[_Visit] = []
        leaving: list[tuple[Copy, torch.Tensor]] = []

        def work_off() -> None:
            leaving.extend(waiting.pop(0).update(group))
            while len(leaving) > NUM_LEAVING:
                leaving.pop(0)[0].synchronize()

        for piece in (part for whole in pieces for part in whole.parts(self._part_bytes)):
            waiting.append(_Visit(piece, self._host, disk, self._runs_on_host(piece)))
            if len(waiting) > 1:
                work_off()
        while waiting:
            work_off()
        for copy, _ in leaving:
            copy.synchronize()

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's; the moments go where this optimizer keeps them."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for key in _MOMENTS:
                if key in state:
                    placed = self._home(parameter, key).copy_(_local(state[key]))
                    state[key] = _like(parameter, placed)
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone()


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Piece:
    """A parameter, or a part of it: itself, its gradient, its two moments, and the number of the step."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    step: torch.Tensor

    @property
    def tensors(self) -> Tensors:
        return self.parameter, self.gradient, self.first, self.second

    def parts(self, max_bytes: int) -> Iterator[_Piece]:
        """Pieces of at most so many bytes a tensor; one where a tensor is not dense."""
        size = max(max_bytes // self.parameter.element_size(), 1)
        if self.parameter.numel() <= size or not all(t.is_contiguous() for t in self.tensors):
            yield self
            return
        for at in range(0, self.parameter.numel(), size):
            p, g, m, v = (t.view(-1)[at : at + size] for t in self.tensors)
            yield _Piece(p, g, m, v, self.step)

    def update(self, group: dict[str, Any]) -> None:
        """AdamW's update, in place."""
        beta1, beta2 = group["betas"]
        torch_private.fused_adamw(
            *self.tensors, self.step.to(self.parameter.device), lr=float(group["lr"]), beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


class _Visit:
    """A piece on its way to where it is updated, and back.

    Args:
        piece: what is updated.
        host: the host's memory, and the lanes between it and the device.
        disk: the file that the moments lie in, if they are read and written directly.
        stays: whether the update runs on the host, so that what lies there is not copied.
    """

    def __init__(self, piece: _Piece, host: HostMemory, disk: DiskFile | None, stays: bool) -> None:
        self.piece, self.host, self.disk, self.stays = piece, host, disk, stays
        self.copies: list[Copy] = []
        self.blocks: dict[int, torch.Tensor] = {}
        self.here = [self._bring(number, tensor) for number, tensor in enumerate(piece.tensors)]

    def _bring(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """Where the update finds a tensor of the piece; a block, where it comes from the disk."""
        if self.disk is not None and self.disk.holds(tensor):
            brought, copy = self.disk.read(tensor, self.host.pool)
            self.blocks[number] = brought
        elif tensor.is_cuda or self.stays:
            return tensor
        else:
            brought, copy = self.host.reload(tensor)
        self.copies.append(copy)
        return brought

    def update(self, group: dict[str, Any]) -> list[tuple[Copy, torch.Tensor]]:
        """Update it, and begin to take back what changed."""
        for copy in self.copies:
            copy.wait()
        if not self.stays:
            for number, block in self.blocks.items():
                self.here[number], copy = self.host.reload(block)
                copy.wait()
        p, g, m, v = self.here
        _Piece(p, g, m, v, self.piece.step).update(group)
        return [
            (self._take_back(number, home, here), here)
            for number, (home, here) in enumerate(zip(self.piece.tensors, self.here, strict=True))
            if home is not here and home is not self.piece.gradient
        ]

    def _take_back(self, number: int, home: torch.Tensor, here: torch.Tensor) -> Copy:
        block = self.blocks.get(number)
        if block is None:
            return self.host.to_host.start(home, here)
        assert self.disk is not None
        return self.disk.write(home, block, None if block is here else self.host.to_host.start(block, here))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def _like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """This rank's part as a tensor of the parameter's kind."""
    return torch_private.dtensor_like(local, parameter) if isinstance(parameter, DTensor) else local


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _compute_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
