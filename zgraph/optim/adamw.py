"""AdamW whose state may be on the host or on disk, and whose update runs there or streams through the device
(Loshchilov, Hutter: "Decoupled weight decay regularization", 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from zgraph.bridge import private_runtime
from zgraph.codegen import updates
from zgraph.codegen.spec import KernelSpec
from zgraph.errors import UsageError
from zgraph.optim.flat import FlatOptimizer, Group, Kernels, check_numbers
from zgraph.optim.runs import Piece, Run, local
from zgraph.optim.streaming import stream
from zgraph.runtime.disk import Access, DiskFile
from zgraph.runtime.host import HostMemory

Place = Literal["auto", "host", "disk"]
Update = Literal["auto", "device", "host"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(FlatOptimizer):
    """AdamW over local shards, as `torch.optim.AdamW(fused=True)` does it: to the last bit where a parameter is updated
    alone, up to the rounding of its last numbers where it is updated with its neighbours.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain.
        lr: the learning rate.
        betas: the decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        state: where the two moments lie: "auto" where the parameter does, "host", or "disk".
        update: where the step is computed: "host" or "device"; "auto" takes the host for parameters that are there. On
            the device, what is elsewhere streams through it.
        folder: for `state="disk"`: where the files go. They vanish with the process.
        access: for `state="disk"`: "direct" streams past the page cache, "mapped" leaves to it what stays in memory;
            "auto" is direct where that is more than a tenth of the free memory, and the file system can.
        chunk_bytes: how much of a tensor is streamed at once, rounded down to whole pages.
        kernels: "aten" or "triton", as in `FlatOptimizer`; what is streamed takes torch's own.

    Raises:
        UsageError: an argument means nothing.
        OffloadError: the host or the disk has no room for the state, or the folder is not writable; nothing is left
            behind.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: Place = "auto",
        update: Update = "auto",
        folder: str | Path | None = None,
        access: Access = "auto",
        chunk_bytes: int = 64 << 20,
        kernels: Kernels = "aten",
    ) -> None:
        check_numbers({"lr": lr, "eps": eps, "weight_decay": weight_decay}, {"beta1": betas[0], "beta2": betas[1]})
        if chunk_bytes < 1:
            raise UsageError(f"chunk_bytes must be positive, not {chunk_bytes}")
        if state not in ("auto", "host", "disk") or update not in ("auto", "device", "host"):
            raise UsageError('state must be "auto", "host" or "disk", and update "auto", "device" or "host"')
        if (state == "disk") != (folder is not None):
            raise UsageError('folder= says where state="disk" keeps its files: give both, or neither')
        if access not in ("auto", "mapped", "direct") or (access != "auto" and folder is None):
            raise UsageError('access must be "auto", "mapped" or "direct", the last two with state="disk"')
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, kernels)
        self.place, self.update_on, self.chunk_bytes = state, update, chunk_bytes
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._device = next((local(p).device for p in parameters if local(p).is_cuda), _compute_device())
        self._host = HostMemory(self._device)
        num_bytes = sum(2 * local(p).nbytes for p in parameters if p.requires_grad)
        if state == "host":
            self._host.require(num_bytes, "AdamW's moments")
        self._overflow: torch.Tensor | None = None
        self._stepped: list[tuple[Run, list[int]]] = []
        self._disk: DiskFile | None = None
        if folder is not None:
            self._disk = DiskFile(Path(folder), num_bytes, 2 * len(parameters), access, self._host.free_bytes)

    # --- where states lie, and where the update runs ---------------------------------------------------------------

    def _make(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        if self.place == "auto" and not self._streams(parameter):
            return super()._make(parameter, key)
        if self._disk is not None:
            return self._disk.zeros(parameter)
        return self._host.pool.empty(parameter.size(), parameter.dtype)

    @property
    def _streams_disk(self) -> bool:
        return self._disk is not None and self._disk.is_direct

    def _runs_on_host(self, parameter: torch.Tensor) -> bool:
        if self.update_on == "host" and parameter.is_cuda:
            raise UsageError('update="host" needs parameters on the host: zgraph.compile(..., offload="optimizer")')
        return self.update_on == "host" or (self.update_on == "auto" and not parameter.is_cuda)

    def _streams(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is updated elsewhere than where all of it lies."""
        if self._runs_on_host(parameter):
            return self._streams_disk
        return self.place != "auto" or parameter.device != self._device

    def _in_place(self, parameter: torch.Tensor) -> bool:
        return self.place == "auto" and not self._streams(local(parameter))

    # --- a step that does not count ----------------------------------------------------------------------------------

    def leave_out_if(self, overflow: torch.Tensor) -> bool:
        """Have the next step change nothing where `overflow` is true; False if it cannot do so.

        It is read where the update runs, so that the host need not wait for it. The caller learns it later, and then
        calls `take_back_step`.
        """
        parameters = [local(p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.kernels != "aten" or any(self._streams(p) or p.device != overflow.device for p in parameters):
            return False
        self._overflow = overflow.to(torch.float32)
        return True

    def take_back_step(self) -> None:
        """Count the last step, which was left out, no more. Only before the next."""
        for run, indices in self._stepped:
            run.steps[indices] -= 1
        self._stepped.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        self._stepped.clear()
        try:
            return super().step(closure)
        finally:
            self._overflow = None

    # --- the update ------------------------------------------------------------------------------------------------

    def _keys(self, group: Group) -> tuple[str, ...]:
        return _MOMENTS

    def _admit(self, parameter: torch.Tensor, run: Run, index: int, keys: tuple[str, ...]) -> bool:
        is_new = super()._admit(parameter, run, index, keys)
        state, home = self.state[parameter], run.step_views[index]
        if (held := state.get("step")) is not home:
            self._settle(state, "step", held, home)
        return is_new

    def _ages(self, run: Run, indices: list[int], are_new: list[bool]) -> list[float]:
        """The number of the step that this is for each."""
        self._stepped.append((run, indices))
        if len(indices) == len(run.parameters):
            run.steps += 1
        else:
            run.steps[indices] += 1
        steps: list[float] = run.steps.tolist()
        return [steps[index] for index in indices]

    def _update(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        parameter = pieces[0].parameter
        if not self._streams(parameter):
            super()._update(group, age, pieces)
            return
        stream(
            pieces,
            self.chunk_bytes,
            self._host,
            self._disk if self._streams_disk else None,
            self._runs_on_host(parameter),
            lambda piece: self._aten(group, age, [piece]),
        )

    def _aten(self, group: Group, age: float, pieces: Sequence[Piece]) -> None:
        beta1, beta2 = group["betas"]
        parameters, gradients, firsts, seconds = zip(*(piece.tensors for piece in pieces), strict=True)
        private_runtime.fused_adamw(
            parameters,
            gradients,
            firsts,
            seconds,
            torch.full((), age, device=parameters[0].device),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            found_inf=self._overflow,
        )

    def _spec(self, group: Group, columns: int, parameter: str, gradient: str, copy: str) -> KernelSpec:
        return updates.adamw(columns, *group["betas"], group["eps"], parameter, gradient, copy)

    def _scalars(self, group: Group, age: float) -> tuple[float, ...]:
        rate, (beta1, beta2) = float(group["lr"]), group["betas"]
        return rate / (1 - beta1**age), 1 - rate * group["weight_decay"], (1 - beta2**age) ** -0.5


def _compute_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
