"""The mesh of a model at run time: which ranks share a shard, and which compute one op together.

The mesh's model axes come first (`zgraph.ir.types.Mesh`): a parameter is cut along them, and what is left of it is
sharded along the data axes as it is without them. Neighbours in rank are neighbours along a model axis, so that what
they exchange in every layer stays within a host: the ranks of `DeviceMesh` are in another order than its axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from zgraph.bridge import parts, private_dtensor, private_runtime
from zgraph.ir import MODEL_AXES, Axis, Shard

Cuts = tuple[tuple[str, Shard], ...]
"""How a parameter is cut: along which model axes, and where."""


def model_mesh(device: str, num_ranks: int, sizes: Mapping[str, int]) -> DeviceMesh:
    """The mesh of all ranks with axes along which they compute together, neighbours along the first.

    Args:
        device: its kind.
        num_ranks: all of them, a multiple of those that compute together.
        sizes: ranks along each of these axes.
    """
    counts = tuple(sizes.values())
    ranks = torch.arange(num_ranks).view(num_ranks // math.prod(counts), *reversed(counts))
    ranks = ranks.permute(*reversed(range(ranks.ndim))).contiguous()
    return DeviceMesh(device, ranks, mesh_dim_names=(*sizes, "shard"))


def num_model_axes(mesh: DeviceMesh | None) -> int:
    """How many of a mesh's axes are model axes."""
    return sum(name in MODEL_AXES for name in (mesh.mesh_dim_names or ())) if mesh is not None else 0


@dataclass(frozen=True)
class ModelRanks:
    """This rank's place in the mesh.

    Args:
        mesh: model axes first, then one or two data axes; None for one rank.
        cuts: of parameters that are cut along model axes, by their names.
    """

    mesh: DeviceMesh | None
    cuts: Mapping[str, Cuts] = field(default_factory=dict)

    @property
    def num_model(self) -> int:
        """Model axes."""
        return num_model_axes(self.mesh)

    @property
    def num_data(self) -> int:
        """Ranks along the data axes, this one among them."""
        return self.mesh.size() // self._beside if self.mesh is not None else 1

    @property
    def _beside(self) -> int:
        assert self.mesh is not None
        return math.prod(self.mesh.shape[: self.num_model])

    @property
    def num_shards(self) -> int:
        """Ranks along the last axis, over which parameters are sharded."""
        return self.mesh.size(-1) if self.mesh is not None else 1

    @cached_property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's number along each axis."""
        found = self.mesh.get_coordinate() if self.mesh is not None else None
        return tuple(found or ())

    @property
    def data_rank(self) -> int:
        """This rank's number among the data ranks."""
        return self._number(range(self.num_model, len(self.coordinate)))

    @property
    def model_rank(self) -> int:
        """This rank's number among those that differ along model axes alone."""
        return self._number(range(self.num_model))

    @property
    def num_batches(self) -> int:
        """Ranks that each have a batch of their own: those that share experts, too."""
        return self.num_data * self._along("expert")

    @property
    def batch_rank(self) -> int:
        """This rank's number among them; neighbours share experts."""
        return self.data_rank * self._along("expert") + self.rank_along("expert")

    def _along(self, axis: str) -> int:
        """Ranks along a model axis; 1 where the mesh has none of this name."""
        names = (self.mesh.mesh_dim_names or ()) if self.mesh is not None else ()
        return self._size(axis) if axis in names else 1

    def rank_along(self, axis: str) -> int:
        """This rank's number along a model axis; 0 where the mesh has none of this name."""
        names = (self.mesh.mesh_dim_names or ()) if self.mesh is not None else ()
        return self.coordinate[names.index(axis)] if axis in names else 0

    def _number(self, axes: range) -> int:
        """This rank's number among those that differ along these axes alone."""
        number = 0
        for axis in axes:
            assert self.mesh is not None
            number = number * self.mesh.size(axis) + self.coordinate[axis]
        return number

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The mesh as passes know it."""
        if self.mesh is None:
            return ()
        names, sizes = self.mesh.mesh_dim_names or (), self.mesh.shape
        model = tuple(Axis(names[i], sizes[i]) for i in range(self.num_model))
        copies = self.num_data // self.num_shards
        return (*model, *[Axis("replicate", copies)] * (copies > 1), Axis("shard", self.num_shards))

    # --- groups ------------------------------------------------------------------------------------------------

    @cached_property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks that reduce gradients with this one."""
        assert self.mesh is not None
        if not self.num_model:
            return private_runtime.whole_group(self.mesh)
        names = (self.mesh.mesh_dim_names or ())[self.num_model :]
        return self.mesh.get_group(names[0]) if len(names) == 1 else self.mesh[names]._flatten().get_group()

    @property
    def data_ranks(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(dist.get_process_group_ranks(self.data_group))

    def axis_group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along a model axis alone."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    # --- parameters --------------------------------------------------------------------------------------------

    def is_cut(self, name: str) -> bool:
        """Whether a parameter is cut along a model axis."""
        return bool(self.cuts.get(name))

    def shape(self, name: str, shape: torch.Size) -> tuple[int, ...]:
        """The shape of a parameter's part along the model axes."""
        found = list(shape)
        for axis, place in self.cuts.get(name, ()):
            found[place.dim] //= self._size(axis)
        return tuple(found)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part along the model axes of a whole tensor that is placed as a parameter; dense if it is one."""
        for axis, place in self.cuts.get(name, ()):
            whole = parts.cut(whole, place, self._size(axis))[self._coordinate(axis)].contiguous()
        return whole

    def whole(self, name: str, part: torch.Tensor, wait: Callable[[dist.Work], None]) -> torch.Tensor:
        """A parameter of which each rank gives its part along the model axes."""
        for axis, place in reversed(self.cuts.get(name, ())):
            own = part.contiguous()
            found = [torch.empty_like(own) for _ in range(self._size(axis))]
            work = dist.all_gather(found, own, group=self.axis_group(axis), async_op=True)
            assert work is not None, "this rank is of the group"
            wait(work)
            part = parts.joined(found, place)
        return part

    def placements(self, name: str, data: Placement) -> list[Placement]:
        """The placements of a parameter as a DTensor: along the model axes, and `data` along the last data axis.

        A sum that is pending is so along all data axes.
        """
        assert self.mesh is not None
        names, cuts = self.mesh.mesh_dim_names or (), dict(self.cuts.get(name, ()))
        model = [
            private_dtensor.shard(cuts[n].dim, cuts[n].blocks) if n in cuts else Replicate()
            for n in names[: self.num_model]
        ]
        others = data if data.is_partial() else Replicate()
        return [*model, *[others] * (self.mesh.ndim - self.num_model - 1), data]

    def _size(self, axis: str) -> int:
        assert self.mesh is not None
        return self.mesh.size((self.mesh.mesh_dim_names or ()).index(axis))

    def _coordinate(self, axis: str) -> int:
        assert self.mesh is not None
        return self.coordinate[(self.mesh.mesh_dim_names or ()).index(axis)]
