"""Ranks that compute together: the mesh, and how parameters are cut, by a model's own plan or placements by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.errors import PlacementError, UsageError
from zgraph.ir import Shard
from zgraph.options.experts import experts_of
from zgraph.options.model_plans import Placements, given, planned
from zgraph.runtime.model_ranks import Cuts, model_mesh

AXIS, CONTEXT, EXPERT = "tensor", "context", "expert"

AXES = (AXIS, CONTEXT, EXPERT)
"""The axes along which ranks compute together, in the order in which a mesh has them."""


def mesh_of(device: torch.device, mesh: DeviceMesh | None, sizes: Mapping[str, int]) -> DeviceMesh | None:
    """The mesh with axes along which ranks compute together; None where nothing is.

    Args:
        device: where the model is.
        mesh: what the user gave; one with an axis called `tensor`, `context` or `expert` says by itself how many ranks
            lie along it.
        sizes: ranks that compute together along each of these axes.

    Raises:
        UsageError: the ranks do not divide, or the mesh and the numbers contradict each other.
    """
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"{axis}_parallel must be a number of ranks, 1 or more, not {size!r}")
    names = mesh.mesh_dim_names or () if mesh is not None else ()
    wanted = {axis: size for axis, size in sizes.items() if size > 1}
    if mesh is None or not set(AXES) & set(names):
        if not wanted:
            return None
        if mesh is not None:
            axis, size = next(iter(wanted.items()))
            raise UsageError(
                f"{axis}_parallel={size} needs a mesh with an axis called {axis!r}, or none: leave mesh= "
                f'out, or make it with init_device_mesh(..., mesh_dim_names=("shard", "{axis}"))'
            )
        return _of_all_ranks(device, wanted)
    own = tuple(axis for axis in AXES if axis in names)
    for axis, size in wanted.items():
        if axis not in names:
            raise UsageError(f"{axis}_parallel={size}, but the mesh has no axis called {axis!r}: give it one")
    for axis in own:
        size = mesh.size(names.index(axis))
        if sizes[axis] not in (1, size):
            raise UsageError(f"{axis}_parallel={sizes[axis]}, but the mesh has {size} ranks along {axis}")
        if size == 1:
            raise UsageError(f"the mesh has one rank along {axis}; leave the axis out")
    others = [name for name in names if name not in AXES]
    if mesh.size() != dist.get_world_size() or len(others) > 1:
        raise UsageError(
            f"a mesh with an axis called {own[0]!r} has all ranks of the job and one axis beside it, to shard over; "
            f"not {dict(zip(names, mesh.shape, strict=True))} of {dist.get_world_size()} ranks"
        )
    order = [names.index(name) for name in (*own, *others)]
    ranks = mesh.mesh.permute(order) if others else mesh.mesh.permute(order).unsqueeze(-1)
    return DeviceMesh(mesh.device_type, ranks.contiguous(), mesh_dim_names=(*own, "shard"))


def _of_all_ranks(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    count, together = dist.get_world_size() if dist.is_initialized() else 1, math.prod(sizes.values())
    if count % together:
        has = "there is no process group, and so one rank" if not dist.is_initialized() else f"there are {count} ranks"
        given = " and ".join(f"{axis}_parallel={size}" for axis, size in sizes.items())
        raise UsageError(f"{given}, but {has}; start a multiple of {together}: torchrun --nproc-per-node={together}")
    return model_mesh(device.type, count, sizes)


def sizes_of(mesh: DeviceMesh | None) -> Mapping[str, int]:
    """Ranks along each axis along which they compute together; 1 where a mesh has none."""
    names = mesh.mesh_dim_names or () if mesh is not None else ()
    return {axis: mesh.size(names.index(axis)) if mesh is not None and axis in names else 1 for axis in AXES}


def check_parallel(
    kernels: str, offload: object, fullgraph: object, dynamic: bool | None, compute: str | None, *, has_recipe: bool
) -> None:
    """Refuse options that do not go with ranks that compute together.

    Raises:
        UsageError: one of them, with what to do instead.
    """
    if fullgraph is not True:
        raise UsageError(
            f"ranks that compute together do so by one graph, so that fullgraph must be True, not {fullgraph!r}"
        )
    if dynamic:
        raise UsageError(
            "ranks that compute together cut sizes that are known: leave dynamic= out, and pad inputs (lengths=)"
        )
    wanted = (offload,) if isinstance(offload, str) else tuple(offload) if isinstance(offload, list | tuple) else ()
    if set(wanted) & {"optimizer", "parameters"}:
        raise UsageError(
            f'where ranks compute together, offload must be "auto", "activations" or None, not {offload!r}'
        )
    if compute is not None:
        raise UsageError(
            f"float8 takes its scales from whole matrices: leave compute={compute!r}, or tensor_parallel=, "
            "context_parallel= and expert_parallel=, out"
        )
    if kernels == "triton" and not has_recipe:
        raise UsageError(
            'kernels="triton" fuses ops of whole tensors; where ranks compute together take "aten" or "auto"'
        )


def check_sequence(sequence_parallel: object, mesh: DeviceMesh | None, *, has_recipe: bool) -> None:
    """Refuse sequence parallelism where nothing is computed together, or where a recipe says what passes run.

    Raises:
        UsageError: so it is, with what to do instead.
    """
    if not isinstance(sequence_parallel, bool):
        raise UsageError(f"sequence_parallel must be True or False, not {sequence_parallel!r}")
    if sequence_parallel and sizes_of(mesh)[AXIS] == 1:
        raise UsageError("sequence_parallel=True cuts activations over the ranks of tensor_parallel=; give that too")
    if sequence_parallel and sizes_of(mesh)[CONTEXT] > 1:
        raise UsageError("context_parallel= cuts the sequence already, over all ops; leave sequence_parallel= out")
    if sequence_parallel and has_recipe:
        raise UsageError("a recipe says itself how activations lie: write place(sequence=true) in passes=")


def cuts_of(model: nn.Module, placements: Placements | None, num_ranks: int, num_shards: int) -> Mapping[str, Cuts]:
    """How each parameter is cut over the ranks that compute together, by name; those that stay whole are not there.

    Args:
        model: the model.
        placements: what the user says; None takes the model's plan.
        num_ranks: ranks along the axis of tensor parallelism.
        num_shards: ranks that what is left of a parameter is sharded over.

    Raises:
        UsageError: there is no plan for the model, or a pattern names no parameter.
        PlacementError: a parameter does not divide.
    """
    if num_ranks == 1:
        if placements is not None:
            raise UsageError("placements= says how parameters are cut; give tensor_parallel= too")
        return {}
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
        if place.dim == 0 and len(place.blocks) > 1 and num_shards > 1:
            raise PlacementError(
                f"{name} cannot be {place}: dim 0 is sharded over the {num_shards} ranks of {AXIS} groups too, and "
                f"torch puts no such DTensor together again; leave it whole with Replicate(), or take {Shard(0)}"
            )
    return {name: ((AXIS, place),) for name, place in found.items()}


def at_rest(
    model: nn.Module, cuts: Mapping[str, Cuts], sizes: Mapping[str, int], stage_of: Callable[[str], int]
) -> Mapping[str, Cuts]:
    """The cuts of parameters along the axes, those that shard them at rest over ranks with parts of a batch included.

    Ranks that share a sequence, or experts, have the whole of a parameter where they use it, so that it is sharded over
    them as over data ranks: along the first dim that divides and is not cut in blocks already. One of stage 0, or
    without such a dim, is whole. The matrices of experts are cut along the first dim at any stage, and are used so;
    ranks that share a sequence shard these along another.

    Args:
        model: the model.
        cuts: along the axis of tensor parallelism, by name.
        sizes: ranks along each axis.
        stage_of: from a parameter's name to its stage.

    Raises:
        PlacementError: experts are to be divided, and there are none, or they do not divide.
    """
    experts = experts_of(model, sizes[EXPERT]) if sizes[EXPERT] > 1 else frozenset[str]()
    found = dict(cuts)
    for name, parameter in model.named_parameters():
        rest = rest_axes(sizes, sharded=bool(stage_of(name)), is_expert=name in experts)
        if own := cuts_at_rest(tuple(parameter.shape), cuts.get(name, ()), sizes, rest):
            found[name] = own
    return found


def rest_axes(sizes: Mapping[str, int], *, sharded: bool, is_expert: bool) -> Mapping[str, tuple[int, ...] | None]:
    """The axes of ranks with parts of a batch over which a parameter is sharded at rest, and the dims that may be cut.

    Args:
        sizes: ranks along each axis.
        sharded: whether its stage shards it.
        is_expert: whether it has the matrices of experts that are divided.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    if sizes[CONTEXT] > 1 and sharded:
        found[CONTEXT] = (1, 2) if is_expert else None
    if sizes[EXPERT] > 1 and (sharded or is_expert):
        found[EXPERT] = (0,) if is_expert else None
    return found


def cuts_at_rest(
    shape: tuple[int, ...], cuts: Cuts, sizes: Mapping[str, int], rest: Mapping[str, tuple[int, ...] | None]
) -> Cuts:
    """The cuts of a parameter with those at rest, each along the first dim that divides and is in no blocks.

    Args:
        shape: of the whole parameter.
        cuts: those along other axes.
        sizes: ranks along each axis.
        rest: as `rest_axes` has it.
    """
    left = list(shape)
    for axis, place in cuts:
        left[place.dim] = left[place.dim] // sizes[axis] if len(place.blocks) == 1 else 0
    for axis, allowed in rest.items():
        dims = [d for d in (range(len(left)) if allowed is None else allowed) if left[d] and left[d] % sizes[axis] == 0]
        if dims:
            left[dims[0]] //= sizes[axis]
            cuts = (*cuts, (axis, Shard(dims[0])))
    return cuts
