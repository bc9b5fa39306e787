"""Parameters at rest: this rank's shards side by side in flat buffers, seen from outside as DTensors.

Offloaded masters lie in the host's memory, for an optimizer that works there. A copy in the compute dtype stays on the
device or is on the host too; it is made anew when a master changed.

While the model runs, each parameter is represented by a *placeholder*: a parameter of full shape whose memory has been
freed. torch.compile looks at its metadata only; what computes is the gathered value that the plan makes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import compute_dtype
from zgraph.ir.layout import chunk_numel, chunk_rows, dense_strides, local_rows
from zgraph.runtime.flat_buffers import Flats, Part, align_numel
from zgraph.runtime.host import PAGE_BYTES, HostMemory
from zgraph.runtime.materialise import materialise
from zgraph.runtime.mixed import take_part
from zgraph.runtime.model_ranks import Cuts, ModelRanks
from zgraph.runtime.owners import Owner, every_owner
from zgraph.runtime.working_copies import WorkingCopies, are_brought

if TYPE_CHECKING:
    from zgraph.runtime.peers import Peers

PARAMETERS = "parameters"
"""Of a parameter that is offloaded so, what is computed with is on the host too."""


@dataclass
class Slot:
    """One parameter, wherever in the model it is used.

    Args:
        name: its first name in the model.
        stage: its ZeRO stage; None leaves it to the recipe.
        parameter: what the model holds at rest.
        placeholder: what the model holds while it runs; `parameter` itself where that can serve.
        rest: this rank's memory of it: its padded chunk in one dimension, or the whole tensor where it is replicated.
        working: the tensor to compute with: `rest`, or where the parameter is offloaded a copy of it.
        offload: what of it is on the host: nothing, "optimizer" (master, gradient, optimizer state) or "parameters".
        owners: every place that holds it.
        beside: the copy to compute with as it is cast where the master is: `working`, or what that is brought from;
            None where nothing is cast.
        holds_unreduced: whether a plain tensor in `.grad` has what this rank alone made.
    """

    name: str
    stage: int | None
    parameter: nn.Parameter
    placeholder: nn.Parameter
    rest: torch.Tensor
    working: torch.Tensor
    offload: str = ""
    owners: list[Owner] = field(default_factory=list)
    beside: torch.Tensor | None = None
    holds_unreduced: bool = False

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.parameter, DTensor) and isinstance(self.parameter.placements[-1], Shard)

    def local_part(self, chunk: torch.Tensor) -> torch.Tensor:
        """The part of a padded chunk that this rank really holds, in the shape of its shard."""
        local = self.parameter._local_tensor  # type: ignore[attr-defined]
        return chunk[: local.numel()].view(local.shape)


_STORES: weakref.WeakSet[ShardStore] = weakref.WeakSet()


def slots_at_rest() -> dict[int, tuple[ShardStore, Slot]]:
    """The slot of every parameter that a compiled model holds at rest, by the parameter's id, and its store."""
    return {id(slot.parameter): (store, slot) for store in _STORES for slot in store.slots.values()}


def settle_host_memory() -> None:
    """Wait for copies that still read parameters in the host's memory: somebody is about to write there."""
    for store in list(_STORES):
        store.copies.settle()


class ShardStore:
    """All parameters of a model at rest.

    Args:
        model: whose parameters to take. It is changed in place.
        mesh: the ranks, sharded over its last axis, model axes first; None for one rank, where everything stays whole.
        group: all ranks of the mesh.
        stages: the stage of each parameter by name; None for what the recipe decides.
        default_stage: the stage that the recipe decides.
        param_dtype: the dtype to compute in; None computes in the parameters' own.
        device: where the shards live.
        offloads: the names of parameters that are offloaded, and what of them.
        host: the host's memory.
        placeholder_class: of the placeholders. With one of its own, every parameter has a placeholder.
        cuts: of parameters that are cut along model axes.

    Attributes:
        is_lent: whether parameters at rest are whole for now, so that somebody may change them.
        keeps_gradients: whether an optimizer reduces gradients itself, which backwards leave to it at stages 0 and 1.

    Raises:
        OffloadError: the host has no room for what is offloaded.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | None,
        group: dist.ProcessGroup | None,
        stages: dict[str, int | None],
        default_stage: int,
        param_dtype: torch.dtype | None,
        device: torch.device,
        offloads: Mapping[str, str],
        host: HostMemory,
        placeholder_class: type[nn.Parameter] = nn.Parameter,
        cuts: Mapping[str, Cuts] = MappingProxyType({}),
    ) -> None:
        self.model, self.mesh, self.group, self.param_dtype, self.device = model, mesh, group, param_dtype, device
        self.ranks = ModelRanks(mesh, cuts)
        self.num_ranks, self.num_shards = self.ranks.num_data, self.ranks.num_shards
        self.rank = dist.get_rank(group) if mesh is not None else 0
        self.data_rank = self.ranks.data_rank
        self.shard = self.data_rank % self.num_shards
        self.offloads, self.host = offloads, host
        self.default_stage, self.placeholder_class = default_stage, placeholder_class
        self.peers: Peers | None = None
        self.slots: dict[str, Slot] = {}
        found = every_owner(model)
        shards = {
            name: self.num_ranks > 1 and p.dim() > 0 and (default_stage if stages[name] is None else stages[name]) != 0
            for name, (p, _) in found.items()
        }
        self.any_sharded = any(shards.values()) or self.ranks.num_model > 0
        if self.any_sharded and mesh is not None:
            take_part(mesh)
        sharded = {n: p for n, (p, _) in found.items() if shards[n]}
        self._check_host(
            chunk_numel(self.ranks.shape(n, p.shape), self.num_shards if shards[n] else 1) * p.element_size()
            for n, (p, _) in found.items()
            if offloads.get(n)
        )
        self._masters = Flats({n: self._master(n, p) for n, p in sharded.items()}, device, host)
        copies = {n: self._copy(n, p) for n, p in sharded.items() if self._needs_copy(n, p)}
        self._copies = Flats(copies, device, host)
        staged = {n: part._replace(on_host=True) for n, part in copies.items() if self._stages(n, part)}
        self._staged = Flats(staged, device, host)
        self.flats = list(self._masters.buffers.values())
        for name, (parameter, owners) in found.items():
            if parameter.is_meta:
                parameter = materialise(model, name, device)
            stage = stages[name] if parameter.dim() > 0 else 0
            slot = (self._shard if shards[name] else self._replicate)(name, stage, parameter)
            slot.owners = owners
            self.slots[name] = slot
        self._whole = [s for s in self.slots.values() if not s.is_sharded]
        copied = [s for s in self.slots.values() if s.working is not s.rest]
        self.copies = WorkingCopies(copied, host, lambda: self.version)
        self.is_lent = self.keeps_gradients = False
        self._by_swap = [s for s in self.slots.values() if s.placeholder is not s.parameter]
        self._parameters: list[torch.Tensor] = [s.parameter for s in self.slots.values()]
        self._places = self._pointers()
        self._put(at_rest=True)
        _STORES.add(self)

    # --- running -----------------------------------------------------------------------------------------------

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """The model with placeholders in the place of its parameters."""
        self.copies.refresh()
        for slot in self._by_swap:
            if slot.placeholder.requires_grad != slot.parameter.requires_grad:
                slot.placeholder.requires_grad_(slot.parameter.requires_grad)
        self._put(at_rest=False)
        try:
            yield
        finally:
            self._put(at_rest=True)

    def _put(self, *, at_rest: bool) -> None:
        for slot in self._by_swap:
            held = slot.parameter if at_rest else slot.placeholder
            for owner, key in slot.owners:
                owner[key] = held

    @property
    def version(self) -> int:
        """Grows whenever a parameter at rest is written to."""
        return sum([t._version for t in self.flats]) + sum([p._version for p in self._parameters])

    def moved(self) -> str | None:
        """The name of a parameter whose memory is no longer this store's (`model.to()` was called, say)."""
        if (places := self._pointers()) == self._places:
            return None
        return next(n for n, now, before in zip(self.slots, places, self._places, strict=True) if now != before)

    def _pointers(self) -> list[int]:
        return [(p._local_tensor if isinstance(p, DTensor) else p).data_ptr() for p in self._parameters]

    @property
    def rest_bytes(self) -> int:
        """Bytes of parameters that this rank's device holds at rest."""
        whole = (s.working for s in self._whole if s.offload != PARAMETERS)
        return sum(f.num_bytes(on_host=False) for f in (self._masters, self._copies)) + _num_bytes(whole)

    @property
    def state_bytes(self) -> int:
        """Bytes of AdamW's two moments on the device: of parameters whose master is there."""
        return 2 * (self._masters.num_bytes(on_host=False) + _num_bytes(s.rest for s in self._whole if not s.offload))

    @property
    def host_bytes(self) -> int:
        """Bytes at rest on the host: masters, AdamW's moments of them, and copies to compute with."""
        whole = [s for s in self._whole if s.offload]
        masters = self._masters.num_bytes(on_host=True) + _num_bytes(s.rest for s in whole)
        cast = [
            s.beside for s in whole if s.beside is not None and (s.offload == PARAMETERS or s.beside is not s.working)
        ]
        return 3 * masters + sum(f.num_bytes(on_host=True) for f in (self._copies, self._staged)) + _num_bytes(cast)

    @property
    def update_bytes(self) -> int:
        """Bytes that the step of a torch.optim.AdamW has alive above rest: the gradients, and what it computes with. On
        a processor that is two tensors as large as a shard, and one as large as the shard before it; on a GPU, which
        takes all at once, as much as all shards."""
        here = [s for s in self.slots.values() if s.parameter.requires_grad and not s.offload]
        sizes = [s.rest.nbytes for s in here]
        if self.device.type != "cpu":
            return 2 * sum(sizes)
        return sum(sizes) + max((2 * size + last for last, size in pairwise([0, *sizes])), default=0)

    # --- taking the model's parameters -------------------------------------------------------------------------

    def _check_host(self, masters_bytes: Iterable[int]) -> None:
        """Refuse what the host has no room for, before anything is moved: masters, gradients and two moments."""
        needed = sum(4 * num_bytes + PAGE_BYTES for num_bytes in masters_bytes)
        self.host.require(needed, "the masters, gradients and optimizer states that are offloaded")

    def _master(self, name: str, parameter: nn.Parameter) -> Part:
        """With a copy to compute with, the master lies as that does: what updates one can write the other."""
        numel = chunk_numel(self.ranks.shape(name, parameter.shape), self.num_shards)
        as_copy = compute_dtype(parameter, self.param_dtype) if self._needs_copy(name, parameter) else parameter.dtype
        return Part(numel, parameter.dtype, bool(self.offloads.get(name)), align_numel(as_copy))

    def _needs_copy(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether what is computed with is another memory than the master."""
        offload = self.offloads.get(name)
        return bool(offload) and (
            offload != PARAMETERS or compute_dtype(parameter, self.param_dtype) != parameter.dtype
        )

    def _copy(self, name: str, parameter: nn.Parameter) -> Part:
        numel = chunk_numel(self.ranks.shape(name, parameter.shape), self.num_shards)
        dtype = compute_dtype(parameter, self.param_dtype)
        return Part(numel, dtype, self.offloads[name] == PARAMETERS, align_numel(dtype))

    def _stages(self, name: str, copy: Part) -> bool:
        """Whether a copy on the device is cast on the host first, and brought from there."""
        return not copy.on_host and are_brought(self.device) and copy.dtype != self._masters.views[name].dtype

    def _shard(self, name: str, stage: int | None, parameter: nn.Parameter) -> Slot:
        """Keep this rank's rows in its part of the flat buffer, and free the whole."""
        assert self.mesh is not None
        shape = self.ranks.shape(name, parameter.shape)
        rows = local_rows(shape[0], self.num_shards, self.shard)
        chunk = self._masters.views[name]
        local = chunk[: rows * math.prod(shape[1:])].view(rows, *shape[1:])
        start = self.shard * chunk_rows(shape[0], self.num_shards)
        local.copy_(self.ranks.part(name, self.from_first_rank(parameter.detach()))[start : start + rows])
        at_rest = self._at_rest(name, local, Shard(0), parameter)
        placeholder = self._placeholder(parameter)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        working, offload = self._copies.views.get(name, chunk), self.offloads.get(name, "")
        slot = Slot(name, stage, at_rest, placeholder, chunk, working, offload)
        if working is not chunk:
            is_here = offload == PARAMETERS or not are_brought(self.device)
            slot.beside = working if is_here else self._staged.views.get(name)
        return slot

    def _replicate(self, name: str, stage: int | None, parameter: nn.Parameter) -> Slot:
        """Keep the parameter whole, the first rank's values everywhere; a DTensor too if others are."""
        if parameter.device != self.device and not self.offloads.get(name):
            parameter.data = parameter.detach().to(self.device)
        whole = parameter.detach()
        if self.group is not None:
            whole.copy_(self.from_first_rank(whole))
        is_cut = self.ranks.is_cut(name)
        whole = self.ranks.part(name, whole)
        offload, casts = self.offloads.get(name, ""), compute_dtype(parameter, self.param_dtype) != parameter.dtype
        placeholder, at_rest, rest, working = parameter, parameter, whole, whole
        beside: torch.Tensor | None = None
        if casts or offload or is_cut or self.placeholder_class is not nn.Parameter:
            placeholder = self._placeholder(parameter)
        if offload:
            rest = working = self.host.pool.empty(whole.size(), whole.dtype).copy_(whole)
            if self._needs_copy(name, parameter):
                _, dtype, on_host, _ = self._copy(name, parameter)
                size = whole.size()
                is_brought = not on_host and are_brought(self.device)
                cast = self.host.pool.empty(size, dtype) if on_host or (is_brought and dtype != rest.dtype) else None
                working = cast if on_host and cast is not None else torch.empty(size, dtype=dtype, device=self.device)
                beside = cast if on_host or is_brought else working
            at_rest = nn.Parameter(rest, parameter.requires_grad)
        if self.any_sharded:
            at_rest = self._at_rest(name, rest, Replicate(), parameter)
        if offload or is_cut:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        return Slot(name, stage, at_rest, placeholder, rest, working, offload, beside=beside)

    def _at_rest(self, name: str, local: torch.Tensor, data: Placement, like: nn.Parameter) -> nn.Parameter:
        """A parameter as the model holds it at rest, which lies so along the shard axis."""
        assert self.mesh is not None
        placement, shape = self.ranks.placements(name, data), like.shape
        stride = local.stride() if local.shape == shape else dense_strides(tuple(shape))
        return private_runtime.dtensor_parameter(
            local, self.mesh, placement, shape, stride, requires_grad=like.requires_grad
        )

    def _placeholder(self, parameter: nn.Parameter) -> nn.Parameter:
        """A parameter of this shape, in the dtype to compute in, without memory."""
        tensor = torch.empty(parameter.shape, dtype=compute_dtype(parameter, self.param_dtype), device=self.device)
        tensor.untyped_storage().resize_(0)
        return self.placeholder_class(tensor, parameter.requires_grad)

    @contextmanager
    def held_as(self, slots: Iterable[Slot], tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """The model with these tensors in the place of what it holds of the parameters."""
        before = []
        for slot, tensor in zip(slots, tensors, strict=True):
            for owner, key in slot.owners:
                before.append((owner, key, owner[key]))
                owner[key] = tensor
        try:
            yield
        finally:
            for owner, key, held in before:
                owner[key] = held

    @torch.no_grad()
    def place_buffers(self) -> None:
        """Bring the model's buffers to this store's device."""
        for buffer in self.model.buffers():
            if buffer.device != self.device:
                buffer.data = buffer.to(self.device)

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Copy the first rank's buffers to every rank."""
        for buffer in self.model.buffers():
            buffer.data.copy_(self.from_first_rank(buffer))  # unseen by autograd, which may have saved it

    def from_first_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's values of `tensor`, dense and on this store's device."""
        assert self.group is not None
        if self.rank == 0 or tensor.device == self.device:
            dense = tensor.to(self.device).contiguous()
        else:
            dense = torch.empty(tensor.size(), dtype=tensor.dtype, device=self.device)
        dist.broadcast(dense, dist.get_global_rank(self.group, 0), group=self.group)
        return dense


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
