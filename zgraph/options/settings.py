"""From the options of `zgraph.compile` to settings: checked, completed, and the same for every later step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zgraph.bridge.aten import compute_dtype
from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.private_inductor import inductor_problem
from zgraph.bridge.target import Target, cost_table, device_budget, fingerprint_of, num_bytes
from zgraph.cost import CostTable
from zgraph.errors import ContractError, UsageError
from zgraph.ir.layout import chunk_numel
from zgraph.options.compression import Codes, Compress, check_parameters, codes_for
from zgraph.options.lengths import Lengths, check_lengths
from zgraph.options.model_plans import Placements
from zgraph.options.offload import Offload, Resting, activations, of_parameters
from zgraph.options.parallel import (
    AXES,
    AXIS,
    CONTEXT,
    EXPERT,
    at_rest,
    check_parallel,
    check_sequence,
    cuts_of,
    mesh_of,
    sizes_of,
)
from zgraph.options.searched import FoundPlacements, searched, usual_inputs
from zgraph.options.validate import (
    Compute,
    CudaGraphs,
    Fullgraph,
    Kernels,
    RegionCalls,
    Stage,
    check_can_compute,
    check_cuda_graphs,
    check_kernels,
    check_optimizers,
    check_options,
    check_region_calls,
    default_kernels,
    stage_of,
)
from zgraph.passes import MIXED, RECIPES, Pass, Pipeline, along_model_axes, compressing, pipeline_of, recipe_for
from zgraph.passes.core.base import Choice
from zgraph.runfile.format import RunFile, load_run
from zgraph.runfile.records import begin_record
from zgraph.runtime.agreement import check_joined
from zgraph.runtime.decisions import Meet, alone
from zgraph.runtime.model_ranks import Cuts, ModelRanks

Recompute = Literal["auto"] | bool

Passes = str | Path | Pipeline | Sequence[Pass]
"""A recipe's text, the path of a run file, a pipeline, or passes in order."""

RECOMPUTES: Mapping[Recompute, Choice] = {"auto": "auto", True: "always", False: "never"}


def check_recompute(recompute: object) -> None:
    """Raise UsageError for a word that does not say what is computed again."""
    if recompute not in RECOMPUTES:
        raise UsageError(f'recompute must be "auto", True or False, not {recompute!r}')


class Options(TypedDict, total=False):
    """The options of `zgraph.compile` that `resolve` takes."""

    stage: Stage
    mesh: DeviceMesh | None
    device: torch.device | str | None
    param_dtype: Dtype | None
    reduce_dtype: Dtype | None
    hardware: Target | None
    memory_budget: int | str | None
    recompute: Recompute
    offload: Offload
    kernels: Kernels | None
    compute: Compute | None
    compress: Compress
    passes: Passes | None
    save: str | Path | None
    fullgraph: Fullgraph
    dynamic: bool | None
    lengths: Lengths | None
    tensor_parallel: int
    sequence_parallel: bool
    context_parallel: int
    expert_parallel: int
    placements: Placements | None
    cuda_graphs: CudaGraphs
    record: str | Path | None
    regions: RegionCalls


@dataclass(frozen=True)
class Settings:
    """Options of `zgraph.compile`, resolved for one model on this rank.

    Args:
        device: where the model's shards lie.
        mesh: the ranks that share it; None for one rank.
        default_stage: the stage of the parameters that state none.
        stages: of each parameter by its name; None leaves it to `default_stage`.
        param_dtype: dtype to compute in; None takes each parameter's own.
        reduce_dtype: dtype in which gradients are averaged; None takes the one that they come in.
        pipeline: the passes.
        replayed: a run whose last graph takes the place of the passes.
        costs: what to plan with.
        memory_budget: bytes that this rank's device may have alive; None sets no limit.
        recomputes: whether the forward may be computed again.
        moves: whether values of the forward may wait for the backward on the host.
        offloads: what of each parameter is on the host: "optimizer" or "parameters".
        kernels: what runs the ops between collectives.
        remark: why that is not what was asked for, nor the device's default; empty if it is.
        save: where to write a run file.
        fullgraph: whether the forward must be captured as one graph.
        dynamic: which sizes are symbols, as in `torch.compile`.
        lengths: what inputs are padded to; None leaves them as they are.
        cuts: how parameters are cut along the axes along which ranks compute together, by name.
        cuda_graphs: whether programs are recorded for the GPU to repeat.
        regions: how those that Inductor compiles are called.
        search: what searches for a layout and for placements found, in words; empty where none was.
        record: where to keep what steps take.
    """

    device: torch.device
    mesh: DeviceMesh | None
    default_stage: int
    stages: Mapping[str, int | None]
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    pipeline: Pipeline
    replayed: RunFile | None
    costs: CostTable
    memory_budget: int | None
    recomputes: Choice
    moves: Choice
    offloads: Mapping[str, str]
    kernels: Kernels
    remark: str
    save: Path | None
    fullgraph: Fullgraph
    dynamic: bool | None
    lengths: Lengths | None = None
    cuts: Mapping[str, Cuts] = field(default_factory=dict)
    cuda_graphs: CudaGraphs = False
    regions: RegionCalls = "python"
    search: str = ""
    record: Path | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether the device has separate memory."""
        return self.device.type != "cpu"

    @property
    def compiles_regions(self) -> bool:
        """Whether Inductor compiles what is between collectives."""
        return self.kernels in ("inductor", "auto")

    @property
    def recipe(self) -> str:
        """The passes as text."""
        return str(self.pipeline)

    @property
    def text(self) -> str:
        """Text of the settings that must be the same on all ranks."""
        found = (
            f"recipe {self.recipe}, param_dtype {self.param_dtype}, memory_budget {self.memory_budget}, "
            f"costs {fingerprint_of(self.costs)}"
        ) + (f", lengths {self.lengths.text}" if self.lengths is not None else "")
        cuts = (f"{name} {axis} {place}" for name, places in self.cuts.items() for axis, place in places)
        return found + (f", cut {', '.join(cuts)}" if self.cuts else "")


def resolve(
    model: nn.Module,
    *,
    stage: Stage,
    mesh: DeviceMesh | None,
    device: torch.device | str | None,
    param_dtype: Dtype | None,
    reduce_dtype: Dtype | None,
    hardware: Target | None,
    memory_budget: int | str | None,
    recompute: Recompute,
    offload: Offload,
    kernels: Kernels | None,
    passes: Passes | None,
    save: str | Path | None,
    fullgraph: Fullgraph,
    dynamic: bool | None,
    compute: Compute | None = None,
    compress: Compress = None,
    lengths: Lengths | None = None,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    placements: Placements | None = None,
    cuda_graphs: CudaGraphs = False,
    record: str | Path | None = None,
    layout: str = "",
    regions: RegionCalls = "python",
    meet: Meet = alone,
) -> Settings:
    """Check the options of `zgraph.compile`, which documents them, and complete them for a model. Changes nothing.

    All ranks `meet` before the first of them communicates.

    Raises:
        UsageError, AlreadyCompiledError, RecipeError, ContractError, RunFileError, HardwareError: as `zgraph.compile`.
    """
    has_axis = mesh is not None and bool(set(AXES) & set(mesh.mesh_dim_names or ()))
    check_options(model, stage, None if has_axis else mesh, is_moved=device is not None)
    computed, averaged = as_dtype_or_none(param_dtype, "param_dtype"), as_dtype_or_none(reduce_dtype, "reduce_dtype")
    check_recompute(recompute)
    check_kernels(kernels, passes is not None)
    check_lengths(lengths, model.forward, dynamic)
    device = device_for(model, mesh, device)
    is_gpu = device.type != "cpu"
    check_can_compute(compute, passes is not None, fullgraph, device)
    check_cuda_graphs(cuda_graphs, fullgraph, device)
    check_region_calls(regions, kernels or default_kernels(is_gpu=is_gpu), device)
    kernels, remark = kernels_for(kernels, device)
    replayed = load_run(Path(passes)) if isinstance(passes, str | Path) and str(passes).endswith(".zg") else None
    costs = cost_table(hardware, device)
    asked = {AXIS: tensor_parallel, CONTEXT: context_parallel, EXPERT: expert_parallel}
    meet("mesh", f"ranks together {asked}, of {mesh.mesh_dim_names if mesh is not None else 'all'}")
    parallel = mesh_of(device, mesh, asked)
    if parallel is not None and placements == "auto" and (tensor := sizes_of(parallel)[AXIS]) > 1:
        data = parallel.size() // tensor
        placements = searched(model, (), usual_inputs(model), costs, tensor, data, computed)
    sizes = sizes_of(parallel)
    cuts = cuts_of(model, placements, sizes[AXIS], parallel.size(-1)) if parallel is not None else {}
    if parallel is None and placements is not None:
        raise UsageError("placements= says how parameters are cut; give tensor_parallel= too")
    check_sequence(sequence_parallel, parallel, has_recipe=passes is not None)
    if parallel is not None:
        check_parallel(kernels, offload, fullgraph, dynamic, compute, has_recipe=passes is not None)
        dynamic = False
    mesh = parallel or _mesh(device, mesh)
    codes = codes_for(compress, mesh, has_recipe=passes is not None, fullgraph=fullgraph)
    axes = _axes(parallel, placements, sequence_parallel=sequence_parallel)
    pipeline = pipeline_of(_passes(stage, kernels, compute, codes, passes, replayed, axes, sizes))
    default_stage = stage if isinstance(stage, int) else 3
    stages = {n: None if isinstance(stage, int) else stage_of(stage, n) for n, _ in model.named_parameters()}
    wanted = {name: default_stage if own is None else own for name, own in stages.items()}
    check_parameters(codes, model.named_parameters(), wanted, computed, device)
    cuts = at_rest(model, cuts, sizes, wanted.__getitem__)
    num_ranks = mesh.size() if mesh is not None else 1
    budget = num_bytes(memory_budget) if memory_budget is not None else device_budget(device, num_ranks)
    if mesh is not None and not any("placed" in step.provides for step in pipeline.passes):
        raise ContractError(f"the recipe '{pipeline}' places nothing on the {mesh.size()} ranks; add partition to it")
    moves = activations(offload, budget, is_gpu=is_gpu)
    resting = _resting(model, wanted, ModelRanks(mesh, cuts), computed)
    offloads = of_parameters(offload, resting, budget, is_gpu=is_gpu)
    if fullgraph not in (True, False, "eager"):
        raise UsageError(f'fullgraph must be True, False or "eager", not {fullgraph!r}')
    if offloads and fullgraph == "eager":
        raise UsageError(
            'fullgraph="eager" gathers all parameters at once, so that none can be offloaded; offload=None'
        )
    if record is not None and fullgraph is not True:
        raise UsageError("record= keeps what one training graph takes: a forward in pieces has none; fullgraph=True")
    if record is not None:
        begin_record(Path(record))
    if (mesh is not None and default_stage) or offloads:
        check_optimizers(model)
    return Settings(
        device,
        mesh,
        default_stage,
        stages,
        computed,
        averaged,
        pipeline,
        replayed,
        costs,
        budget,
        RECOMPUTES[recompute],
        moves,
        offloads,
        kernels,
        remark,
        Path(save) if save is not None else None,
        fullgraph,
        dynamic if lengths is None else False,
        lengths,
        cuts,
        cuda_graphs if is_gpu else False,
        "python" if is_gpu else regions,
        "; ".join(filter(None, (layout, placements.summary if isinstance(placements, FoundPlacements) else ""))),
        Path(record) if record is not None else None,
    )


def device_for(model: nn.Module, mesh: DeviceMesh | None, wanted: torch.device | str | None) -> torch.device:
    """Where a model's shards go: where it is wanted, or else where the model is.

    Raises:
        UsageError: there is no such device here, or it is not of the mesh's kind.
    """
    if wanted is None:
        return next((p.device for p in model.parameters() if not p.is_meta), default_device(mesh))
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError):
        raise UsageError(f'device must be a device, such as "cuda" or "cpu", not {wanted!r}') from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f'device must be a GPU or a processor ("cuda", "cpu"), not {device}')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'device="{device}", but torch sees no GPU here; leave device= out')
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if mesh is not None and mesh.device_type != device.type:
        raise UsageError(
            f'device="{device}", but the mesh is of {mesh.device_type}; make the mesh with "{device.type}", or leave '
            "device= out"
        )
    return device


def default_device(mesh: DeviceMesh | None) -> torch.device:
    """Where a model without parameters in memory is put."""
    kind = mesh.device_type if mesh is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def kernels_for(wanted: Kernels | None, device: torch.device) -> tuple[Kernels, str]:
    """The kernels of the ops between collectives, and why they are not those that were wanted or are the default."""
    kernels = wanted or default_kernels(is_gpu=device.type != "cpu")
    if kernels == "auto" and (problem := inductor_problem(device)):
        default = "" if wanted else ", the default on GPUs,"
        return "aten", f'kernels="auto"{default} is kernels="aten" here: Inductor does not compile, as {problem}'
    return kernels, ""


def _passes(
    stage: Stage,
    kernels: Kernels,
    compute: Compute | None,
    codes: Codes,
    passes: Passes | None,
    replayed: RunFile | None,
    axes: Literal["", "stated", "along the sequence", "searched"],
    sizes: Mapping[str, int],
) -> str | Pipeline | Sequence[Pass]:
    if replayed is not None:
        return replayed.recipe
    if passes is not None:
        return str(passes) if isinstance(passes, Path) else passes
    recipe = recipe_for(kernels, RECIPES[stage] if isinstance(stage, int) else MIXED, compute)
    recipe = compressing(recipe, codes.gradients, codes.parameters) if codes else recipe
    if not axes:
        return recipe
    searches, together = "values" if axes == "searched" else "", [axis for axis, size in sizes.items() if size > 1]
    return along_model_axes(recipe, together, sequence=axes == "along the sequence", searches=searches)


def _axes(
    parallel: DeviceMesh | None, placements: Placements | None, *, sequence_parallel: bool
) -> Literal["", "stated", "along the sequence", "searched"]:
    """How values are placed along a model axis: by the placements of parameters, or as a search has it."""
    if parallel is None:
        return ""
    if isinstance(placements, FoundPlacements):
        if sequence_parallel:
            raise UsageError(
                "placements that were searched say themselves where the sequence is cut: leave sequence_parallel= out"
            )
        return "searched"
    return "along the sequence" if sequence_parallel else "stated"


def _mesh(device: torch.device, mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks to shard over; None for one rank."""
    found = _joined(device, mesh)
    return found if found is not None and found.size() > 1 else None


def _joined(device: torch.device, mesh: DeviceMesh | None) -> DeviceMesh | None:
    if mesh is not None and mesh.ndim == 2 and mesh.size(0) == 1:
        return mesh[mesh.mesh_dim_names[1]] if mesh.mesh_dim_names else mesh
    if mesh is None and not dist.is_initialized() and (problem := check_joined()):
        raise UsageError(problem)
    if mesh is not None or not dist.is_initialized():
        return mesh
    if device.type == "cpu" and dist.get_backend() == "nccl":
        raise UsageError('the model is on the CPU, but the process group is NCCL\'s; pass device="cuda" to shard it')
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))


def _resting(
    model: nn.Module, wanted: Mapping[str, int], ranks: ModelRanks, param_dtype: torch.dtype | None
) -> dict[str, Resting]:
    """Bytes that each parameter takes on a rank, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = ranks.num_shards if parameter.dim() and wanted[name] else 1
        numel = chunk_numel(ranks.shape(name, parameter.shape), parts)
        copied = compute_dtype(parameter, param_dtype)
        found[name] = Resting(numel * parameter.element_size(), numel * copied.itemsize)
    return found
