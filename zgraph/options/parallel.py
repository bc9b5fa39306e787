"""Tensor parallelism: the mesh, and how each parameter is cut, from a model's own plan or from placements by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from zgraph.bridge.private_dtensor import blocks_of
from zgraph.errors import PlacementError, UsageError, did_you_mean
from zgraph.ir import Shard
from zgraph.runtime.model_ranks import Cuts, model_mesh

Placements = Mapping[str, Placement | str] | Literal["auto"]
"""From patterns of parameters' names to `Shard(dim)` or `Replicate()` of torch, or a graph's text of it: `S1/3` cuts
dim 1 in each of three blocks. `"auto"` searches for them."""

AXIS = "tensor"

_TEXT = re.compile(r"S([0-9]{1,2})(?:/([0-9]{1,3}))?")

_STYLES: Mapping[str, tuple[Shard, Shard | None]] = {
    "colwise": (Shard(0), Shard(0)),
    "colwise_gather_output": (Shard(0), Shard(0)),
    "colwise_rep": (Shard(0), Shard(0)),
    "packed_colwise": (Shard(0, (1, 1)), Shard(0, (1, 1))),
    "rowwise": (Shard(1), None),
    "rowwise_split_input": (Shard(1), None),
}
"""Placements of a linear layer's weight and bias by the style that a plan of transformers has for it."""

_GATHERED = ("colwise_gather_output", "colwise_rep")
"""Styles of layers whose output is needed whole: they stay so where their sizes do not divide."""

_OWN_PLANS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "*.attn.c_attn.weight": "S1/3",
        "*.attn.c_proj.weight": "S0",
        "*.mlp.c_fc.weight": "S1",
        "*.mlp.c_fc.bias": "S0",
        "*.mlp.c_proj.weight": "S0",
    }
}
"""Megatron's placements for models that transformers has no plan for, by type; rows of these weights are inputs."""


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
    found = dict(_planned(model, num_ranks) if placements is None else _given(model, placements))
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


def _given(model: nn.Module, placements: Mapping[str, Placement | str]) -> Iterator[tuple[str, Shard]]:
    """Placements by the user's patterns: the last that fits a name counts."""
    parameters = dict(model.named_parameters())
    found: dict[str, Shard | None] = {}
    for pattern, placement in placements.items():
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            some = f"its parameters are {', '.join([*parameters][:6])}, ..."
            hint = did_you_mean(pattern.rpartition("*")[2].lstrip("."), parameters, some)
            raise UsageError(f"placements: no parameter of {type(model).__name__} is called {pattern}; {hint}")
        found |= {name: _read(pattern, placement, parameters[name].dim()) for name in names}
    return ((name, place) for name, place in found.items() if place is not None)


def _read(pattern: str, placement: Placement | str, rank: int) -> Shard | None:
    """A placement as the graph has it; None where the parameter stays whole."""
    if isinstance(placement, Replicate) or placement == "R":
        return None
    if isinstance(placement, str):
        if text := _TEXT.fullmatch(placement):
            return Shard(int(text[1]), (1,) * int(text[2] or 1))
    elif (cut := blocks_of(placement)) is not None:
        dim, blocks = cut
        return Shard(dim % rank if rank and -rank <= dim < rank else abs(dim), (1,) * blocks)
    raise UsageError(
        f"placements[{pattern!r}] must be Shard(dim) or Replicate() of torch.distributed.tensor, or a text such as "
        f'"S1" or "S1/3" (dim 1, in each of three blocks), not {placement!r}'
    )


def _planned(model: nn.Module, num_ranks: int) -> Iterator[tuple[str, Shard]]:
    """Placements by the plan that transformers has for a model, or zgraph for it."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if own := _OWN_PLANS.get(kind or ""):
        yield from _given(model, own)
        return
    plan = getattr(model, "tp_plan", None)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for pattern, style in plan.items() if isinstance(plan, dict) else ():
        places = _STYLES.get(style)
        for name in modules if places is not None else ():
            if not isinstance(modules[name], nn.Linear) or not _fits(pattern, name):
                continue
            for key, place in zip(("weight", "bias"), places or (), strict=True):
                parameter = parameters.get(f"{name}.{key}")
                if parameter is None or place is None:
                    continue
                if style not in _GATHERED or place.divides(parameter.shape[place.dim], num_ranks):
                    yield f"{name}.{key}", place


def _fits(pattern: str, name: str) -> bool:
    """Whether a name is one of a pattern of transformers, in which `*` is a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
