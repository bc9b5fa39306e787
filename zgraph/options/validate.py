"""Checks of models and options that `zgraph.compile` makes before it changes anything."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.aten import FROM_TORCH
from zgraph.bridge.private_aot import libraries_problem
from zgraph.codegen.float8 import float8_problem
from zgraph.errors import AlreadyCompiledError, UsageError
from zgraph.passes import COMPUTES, RECIPES

Stage = int | Callable[[str], int]

Kernels = Literal["auto", "aten", "triton", "inductor"]

Compute = Literal["float8", "float8-rowwise"]

Fullgraph = bool | Literal["eager"]

CudaGraphs = bool | Literal["auto"]
RegionCalls = Literal["python", "c++", "auto"]

ATTRIBUTE = "_zgraph"
"""Where a compiled model keeps what `zgraph.compile` attached to it."""


def check_options(model: nn.Module, stage: Stage, mesh: DeviceMesh | None, *, is_moved: bool) -> None:
    """Raise UsageError for a model, a stage or a mesh that cannot be; `is_moved` says that the model's shards go to one
    device, wherever it is.
    """
    if not (callable(stage) or _is_stage(stage)):
        raise UsageError(f"stage must be 0, 1, 2 or 3, or a function from a parameter's name to one, not {stage!r}")
    for module_name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            what = f"its part {module_name}" if module_name else "it"
            raise AlreadyCompiledError(
                f"this {type(model).__name__} cannot be compiled: {what} is compiled already. Compile the outermost "
                "module once, and build a new model to compile it otherwise."
            )
    if mesh is not None:
        _check_mesh(mesh)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UsageError(
                f"the parameter {name} has no shape yet: its module is lazy. Call the model once before it is compiled"
            )
        if parameter.layout is not torch.strided or parameter.dtype not in FROM_TORCH:
            raise UsageError(f"the parameter {name} is {parameter.layout} {parameter.dtype}, which cannot be sharded")
    check_in_memory(model)
    devices = {p.device for p in model.parameters()} - {torch.device("meta")}
    if len(devices) > 1 and not is_moved:
        where = ", ".join(map(str, devices))
        raise UsageError(f"the model's parameters are on {where}; pass device= to shard all of it to one")


_LOADED = ("hf_device_map", "_weight_conversions")
"""Attributes that `from_pretrained` of transformers alone gives a model."""


def check_in_memory(model: nn.Module) -> None:
    """Raise UsageError for a model of transformers' `from_pretrained` whose weights stayed on disk: as of any model on
    the meta device, they would be made anew.
    """
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent and any(hasattr(model, attribute) for attribute in _LOADED):
        raise UsageError(
            f"{len(absent)} weights were not loaded by from_pretrained ({', '.join(absent[:3])}, ...): device_map left "
            "them on disk or on the meta device, and they would be trained from new values. Leave device_map out, and "
            "pass device= to zgraph.compile; for a new model, build it by from_config on the meta device"
        )


def check_kernels(kernels: str | None, has_recipe: bool) -> None:
    if kernels is not None and kernels not in get_args(Kernels):
        raise UsageError(f'kernels must be "auto", "aten", "triton" or "inductor", not {kernels!r}')
    if kernels == "triton" and has_recipe:
        raise UsageError('with passes=, the recipe says what is fused: put fuse in it, and leave kernels="triton" out')


def default_kernels(*, is_gpu: bool) -> Kernels:
    """The kernels of the ops between collectives where none are asked for."""
    return "auto" if is_gpu else "aten"


def check_compute(compute: str | None) -> None:
    """Raise UsageError for a way to multiply matrices that is none."""
    if compute is not None and compute not in get_args(Compute):
        raise UsageError(f'compute must be "float8", "float8-rowwise" or None, not {compute!r}')


def check_can_compute(compute: str | None, has_recipe: bool, fullgraph: object, device: torch.device) -> None:
    """Raise UsageError for a way to multiply matrices that the other options or the device leave no place for."""
    check_compute(compute)
    if compute is None:
        return
    if has_recipe:
        raise UsageError(
            f"with passes=, the recipe says what is in float8: put {COMPUTES[compute]} behind canonicalize in it, and "
            "leave compute= out"
        )
    if fullgraph == "eager":
        raise UsageError(
            f'compute="{compute}" is for matmuls that are captured, and fullgraph="eager" captures nothing; leave one '
            "of them out"
        )
    if problem := float8_problem(device):
        raise UsageError(f'compute="{compute}": {problem}. Leave compute= out; param_dtype="bf16" needs no float8')


def check_region_calls(regions: object, kernels: object, device: torch.device) -> None:
    """Raise UsageError for a way to call regions that is none, or that the other options leave no regions for."""
    if regions not in ("python", "c++", "auto"):
        raise UsageError(f'regions must be "python", "c++" or "auto", not {regions!r}')
    if regions != "c++":
        return
    if kernels not in ("inductor", "auto"):
        raise UsageError(
            f'regions="c++" is for regions that Inductor compiles, and with kernels="{kernels}" there are none; pass '
            'kernels="inductor" too, or leave regions= out'
        )
    if device.type != "cpu":
        raise UsageError(
            f'regions="c++" is for processors, and the model is on the {device.type}; leave it out. With '
            "cuda_graphs=True a GPU repeats many regions in one launch"
        )
    if problem := libraries_problem():
        raise UsageError(f'regions="c++" cannot be: {problem}; install torch 2.13 or later, or leave regions= out')


def check_cuda_graphs(cuda_graphs: object, fullgraph: object, device: torch.device) -> None:
    """Raise UsageError for recordings that the other options or the device leave no place for."""
    if not isinstance(cuda_graphs, bool) and cuda_graphs != "auto":
        raise UsageError(f'cuda_graphs must be True, False or "auto", not {cuda_graphs!r}')
    if cuda_graphs is True and device.type != "cuda":
        raise UsageError(
            f"cuda_graphs=True is for GPUs, and the model is on the {device.type}; leave it out, or put it on one"
        )
    if cuda_graphs is True and fullgraph == "eager":
        raise UsageError(
            'cuda_graphs=True records programs that are captured, and fullgraph="eager" captures nothing; leave one of '
            "them out"
        )


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim not in (1, 2):
        raise UsageError(
            f"mesh must have one axis, or two of which the second is sharded over, not {mesh.ndim}; pass mesh['name'] "
            "to choose one"
        )
    ranks = mesh.mesh.flatten().tolist()
    if mesh.ndim == 2 and (mesh.size(1) == 1 or ranks != sorted(ranks)):
        raise UsageError(
            f"a mesh of two axes needs two ranks or more along the second, and ranks that ascend row by row, not "
            f"{mesh.mesh.tolist()}; for whole copies only, pass the first axis alone with stage=0"
        )


def _is_stage(stage: object) -> bool:
    return isinstance(stage, int) and not isinstance(stage, bool) and stage in RECIPES


def check_optimizers(model: nn.Module) -> None:
    """An optimizer made before holds parameters that are about to be replaced: it would train nothing."""
    ours = {id(p) for p in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):  # isinstance would ask dead weak proxies
            if any(id(p) in ours for group in found.param_groups for p in group["params"]):
                raise UsageError(
                    f"a {type(found).__name__} already holds this model's parameters, which are about to be sharded; "
                    "make the optimizer after zgraph.compile"
                )


def stage_of(stage: Callable[[str], int], name: str) -> int:
    found = stage(name)
    if not _is_stage(found):
        raise UsageError(f"stage must be 0, 1, 2 or 3, but the function gave {found!r} for the parameter {name}")
    return found
