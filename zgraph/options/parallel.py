"""Tensor parallelism: the mesh, and how each parameter is cut, from a model's own plan or from placements by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.errors import PlacementError, UsageError
from zgraph.ir import Shard
from zgraph.options.model_plans import Placements, given, planned
from zgraph.runtime.model_ranks import Cuts, model_mesh

AXIS = "tensor"


def mesh_of(device: torch.device, mesh: DeviceMesh | None, tensor_parallel: int) -> DeviceMesh | None:
    """The mesh with an axis for tensor parallelism; None where nothing is computed together.

    Args:
        device: where the model is.
        mesh: what the user gave; one with an axis called `tensor` says by itself how many ranks there are along it.
        tensor_parallel: ranks that compute one op together.

    Raises:
        UsageError: the ranks do not divide, or the mesh and the number contradict each other.
    """
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int) or tensor_parallel < 1:
        raise UsageError(f"tensor_parallel must be a number of ranks, 1 or more, not {tensor_parallel!r}")
    names = mesh.mesh_dim_names or () if mesh is not None else ()
    if mesh is None or AXIS not in names:
        if tensor_parallel == 1:
            return None
        if mesh is not None:
            raise UsageError(
                f"tensor_parallel={tensor_parallel} needs a mesh with an axis called {AXIS!r}, or none: leave mesh= "
                f'out, or make it with init_device_mesh(..., mesh_dim_names=("shard", "{AXIS}"))'
            )
        return _of_all_ranks(device, tensor_parallel)
    size = mesh.size(names.index(AXIS))
    if tensor_parallel not in (1, size):
        raise UsageError(f"tensor_parallel={tensor_parallel}, but the mesh has {size} ranks along {AXIS}")
    if size == 1:
        raise UsageError(f"the mesh has one rank along {AXIS}; leave the axis out")
    others = [name for name in names if name != AXIS]
    if mesh.size() != dist.get_world_size() or len(others) > 1:
        raise UsageError(
            f"a mesh with an axis called {AXIS!r} has all ranks of the job and one axis beside it, to shard over; not "
            f"{dict(zip(names, mesh.shape, strict=True))} of {dist.get_world_size()} ranks"
        )
    order = [names.index(name) for name in (AXIS, *others)]
    ranks = mesh.mesh.permute(order) if others else mesh.mesh.unsqueeze(-1)
    return DeviceMesh(mesh.device_type, ranks.contiguous(), mesh_dim_names=(AXIS, "shard"))


def _of_all_ranks(device: torch.device, tensor_parallel: int) -> DeviceMesh:
    count = dist.get_world_size() if dist.is_initialized() else 1
    if count % tensor_parallel:
        has = "there is no process group, and so one rank" if not dist.is_initialized() else f"there are {count} ranks"
        raise UsageError(
            f"tensor_parallel={tensor_parallel}, but {has}; start a multiple of {tensor_parallel}: torchrun "
            f"--nproc-per-node={tensor_parallel}"
        )
    return model_mesh(device.type, count, tensor_parallel)


def check_parallel(
    kernels: str, offload: object, fullgraph: object, dynamic: bool | None, compute: str | None, *, has_recipe: bool
) -> None:
    """Refuse options that do not go with tensor parallelism.

    Raises:
        UsageError: one of them, with what to do instead.
    """
    if fullgraph is not True:
        raise UsageError(f"tensor parallelism cuts one graph, so that fullgraph must be True, not {fullgraph!r}")
    if dynamic:
        raise UsageError("tensor parallelism cuts sizes that are known: leave dynamic= out, and pad inputs (lengths=)")
    wanted = (offload,) if isinstance(offload, str) else tuple(offload) if isinstance(offload, list | tuple) else ()
    if set(wanted) & {"optimizer", "parameters"}:
        raise UsageError(f'with tensor parallelism, offload must be "auto", "activations" or None, not {offload!r}')
    if compute is not None:
        raise UsageError(
            f"float8 takes its scales from whole matrices: leave compute={compute!r} or tensor_parallel= out"
        )
    if kernels == "triton" and not has_recipe:
        raise UsageError('kernels="triton" fuses ops of whole tensors; with tensor parallelism take "aten" or "auto"')


def check_sequence(sequence_parallel: object, mesh: DeviceMesh | None, *, has_recipe: bool) -> None:
    """Refuse sequence parallelism where nothing is computed together, or where a recipe says what passes run.

    Raises:
        UsageError: so it is, with what to do instead.
    """
    if not isinstance(sequence_parallel, bool):
        raise UsageError(f"sequence_parallel must be True or False, not {sequence_parallel!r}")
    if sequence_parallel and mesh is None:
        raise UsageError("sequence_parallel=True cuts activations over the ranks of tensor_parallel=; give that too")
    if sequence_parallel and has_recipe:
        raise UsageError("a recipe says itself how activations lie: write place(sequence=true) in passes=")


def cuts_of(model: nn.Module, placements: Placements | None, mesh: DeviceMesh) -> Mapping[str, Cuts]:
    """How each parameter is cut over the ranks that compute together, by name; those that stay whole are not there.

    Args:
        model: the model.
        placements: what the user says; None takes the model's plan.
        mesh: the ranks, the axis of tensor parallelism first.

    Raises:
        UsageError: there is no plan for the model, or a pattern names no parameter.
        PlacementError: a parameter does not divide.
    """
    num_ranks = mesh.size(0)
    if isinstance(placements, str):
        raise UsageError(f'placements must be "auto", or from names of parameters to placements, not {placements!r}')
    found = dict(planned(model, num_ranks) if placements is None else given(model, placements))
    parameters = dict(model.named_parameters())
    if placements is None and not found:
        raise UsageError(
            f"there is no plan for tensor parallelism of {type(model).__name__}: say how its parameters are cut, "
            'placements={"*.up_proj.weight": Shard(0), "*.down_proj.weight": Shard(1)}'
        )
    for name, place in found.items():
        shape = tuple(parameters[name].shape)
        if place.dim >= len(shape) or not place.divides(shape[place.dim], num_ranks):
            raise PlacementError(
                f"{name} of shape {shape} does not divide into {place} over {num_ranks} ranks; cut another dim, leave "
                "it whole with Replicate(), or take another tensor_parallel="
            )
        if place.dim == 0 and len(place.blocks) > 1 and mesh.size(-1) > 1:
            raise PlacementError(
                f"{name} cannot be {place}: dim 0 is sharded over the {mesh.size(-1)} ranks of {AXIS} groups too, and "
                f"torch puts no such DTensor together again; leave it whole with Replicate(), or take {Shard(0)}"
            )
    return {name: ((AXIS, place),) for name, place in found.items()}
