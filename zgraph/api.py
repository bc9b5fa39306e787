"""`zgraph.compile`: the one place that wires capture, passes and runtime together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.bridge.private_runtime import whole_group
from zgraph.bridge.target import Target, cost_table, device_budget, fingerprint_of, num_bytes
from zgraph.capture import Frontend, ParamInfo, drop_gradient_hooks
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.compiler.call_guard import Unprepared, check_moved, guard
from zgraph.compiler.compiled_model import CompiledModel, buffer_bytes, enabled
from zgraph.compiler.report import Report
from zgraph.errors import ContractError, UsageError
from zgraph.ir import Axis
from zgraph.ir.layout import chunk_numel
from zgraph.options.offload import Offload, Resting, activations, of_parameters
from zgraph.options.validate import ATTRIBUTE, Kernels, Stage, check_kernels, check_optimizers, check_options, stage_of
from zgraph.passes import MIXED, RECIPES, Context, fusing, parse_recipe
from zgraph.passes.core.base import Choice
from zgraph.passes.fuse import Fuse
from zgraph.runfile.format import load_run
from zgraph.runtime import HostMemory, Session, ShardStore
from zgraph.runtime.agreement import check_joined, settings_lines
from zgraph.runtime.eager_fallback import run_whole, whole_parameters
from zgraph.runtime.loading import checked_loading, place_state_dict
from zgraph.runtime.materialise import check_initialisable, materialise_buffers
from zgraph.runtime.peers import Peers, unique_name
from zgraph.runtime.regions import Regions

M = TypeVar("M")

Recompute = Literal["auto"] | bool

RECOMPUTES: Mapping[Recompute, Choice] = {"auto": "auto", True: "always", False: "never"}


class Options(TypedDict, total=False):
    """The options of `compile`, for type checkers."""

    stage: Stage
    mesh: DeviceMesh | None
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    hardware: Target | None
    memory_budget: int | str | None
    recompute: Recompute
    offload: Offload
    kernels: Kernels
    passes: str | Path | None
    save: str | Path | None
    fullgraph: bool
    dynamic: bool | None


@overload
def compile(model: M, **options: Unpack[Options]) -> M: ...
@overload
def compile(model: None = None, **options: Unpack[Options]) -> Callable[[M], M]: ...
def compile(
    model: Any = None, *, stage: Stage = 3, mesh: DeviceMesh | None = None, param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None, hardware: Target | None = None, memory_budget: int | str | None = None,
    recompute: Recompute = "auto", offload: Offload = "auto", kernels: Kernels = "aten",
    passes: str | Path | None = None, save: str | Path | None = None, fullgraph: bool = True,
    dynamic: bool | None = None,
) -> Any:  # fmt: skip
    """Shard a model over the ranks and compile its training step, in place.

    The model stays the same object of the same class with the same parameter names; its parameters become DTensors
    (plain tensors on one rank or where all are stage 0). Any torch optimizer, scheduler, `clip_grad_norm_` and
    `torch.distributed.checkpoint` work on it. The first rank's parameters and buffers are taken on every rank.

    Args:
        model: a module; or a module class, whose instances are then compiled when they are made. Without it, a
            decorator with these options is returned.
        stage: the ZeRO stage, 0 to 3, or a function from a parameter's name to its stage.
        mesh: a mesh of one axis to shard over; by default all ranks. Over a mesh of two, parameters are sharded along
            the second axis (within a host, say) and replicated along the first. Without a process group there is one
            rank.
        param_dtype: dtype to compute in, with masters in the parameters' own dtype; floating-point inputs are cast.
        reduce_dtype: dtype in which gradients are averaged over ranks; by default the dtype that they come in.
        hardware: what to plan for: a profile's name (`h100`), a table measured by `zgraph.profile`, or the path of
            either; by default what fits the device.
        memory_budget: bytes, or a size such as "12GiB", that one rank's device may have alive: parameters, AdamW's two
            moments, buffers, and the step's peak. What does not fit is computed again in the backward, or moved to the
            host; stage 3 keeps gathered parameters from forward to backward as far as there is room. By default what a
            GPU has, less a margin; on processors there is no limit then, all of the forward is kept, and parameters are
            gathered again.
        recompute: "auto" computes again what the budget has no room for; False nothing but what the user put under
            `torch.utils.checkpoint`; True all that can be.
        offload: what goes to the host's memory. "auto" takes what the budget makes necessary, on GPUs; None nothing;
            else any of "activations" (of what waits for the backward that which has no room; all, without a budget),
            "optimizer" (masters, gradients and optimizer state: the optimizer's step runs on the host) and
            "parameters" (all of that, and what is computed with).
        kernels: "aten" runs all ops one by one; "triton" fuses what lies between matmuls into generated kernels, which
            compute in fp32 throughout: on GPUs where they were measured to be faster, in the first call (on processors
            by their twins in torch, which save no time); "inductor" has torch's Inductor compile what lies between
            collectives, each different piece once, whichever layers it stands in; "auto" is "triton" on GPUs.
        passes: a recipe in the place of the stage's own (`zgraph.recipe(stage)` gives that); or the path of a run file
            (`run.zg`), whose last graph is run as it is, if the model is captured as it was for that file.
        save: where to write a run file: the captured graph, the graph after every pass, and what the passes knew.
        fullgraph: False lets a forward through that cannot be captured as one graph: everything is gathered for the
            length of the call and runs eagerly, with a warning.
        dynamic: as in `torch.compile`: None learns which sizes change, True takes them all as symbols at once.

    Returns:
        The model, the class, or a decorator.

    Raises:
        UsageError: an option means nothing, or the model cannot be sharded as asked.
        AlreadyCompiledError: the model, or a part of it, is compiled already.
        RecipeError, ContractError: the recipe does not parse or does not fit together.
        RunFileError: the run file is none, or (in the first call) of another model.
        HardwareError: there is no such hardware.
        OffloadError: the host has no room for what is offloaded; nothing was changed.
        PlanMismatchError: the ranks have different models or options.

    The first call raises BudgetError if even with all computed again the step does not fit the budget.
    """
    options: Options = {
        "stage": stage, "mesh": mesh, "param_dtype": param_dtype, "reduce_dtype": reduce_dtype, "hardware": hardware,
        "memory_budget": memory_budget, "recompute": recompute, "offload": offload, "kernels": kernels,
        "passes": passes, "save": save, "fullgraph": fullgraph, "dynamic": dynamic,
    }  # fmt: skip
    if model is None:
        return functools.partial(compile, **options)
    if isinstance(model, type) and issubclass(model, nn.Module):
        return _compile_class(model, options)
    if not isinstance(model, nn.Module):
        raise UsageError(f"zgraph.compile takes a module or a module class, not {type(model).__name__}")
    check_options(model, stage, mesh, param_dtype, reduce_dtype)
    if recompute not in RECOMPUTES:
        raise UsageError(f'recompute must be "auto", True or False, not {recompute!r}')
    check_kernels(kernels, passes is not None)
    default_stage = stage if isinstance(stage, int) else 3
    own = RECIPES[stage] if isinstance(stage, int) else MIXED
    device = next((p.device for p in model.parameters() if not p.is_meta), _default_device(mesh))
    if kernels == "auto":
        kernels = "aten" if device.type == "cpu" or passes is not None else "triton"
    replayed = load_run(Path(passes)) if passes is not None and str(passes).endswith(".zg") else None
    recipe = str(passes) if passes is not None else fusing(own) if kernels == "triton" else own
    recipe = replayed.recipe if replayed is not None else recipe
    pipeline = parse_recipe(recipe)
    stages = {n: None if isinstance(stage, int) else stage_of(stage, n) for n, _ in model.named_parameters()}
    costs = cost_table(hardware, device)
    budget = num_bytes(memory_budget) if memory_budget is not None else device_budget(device)
    mesh = _mesh(model, mesh)
    mesh = mesh if mesh is not None and mesh.size() > 1 else None
    group = whole_group(mesh) if mesh is not None else None
    if mesh is not None and not any("placed" in step.provides for step in pipeline.passes):
        raise ContractError(f"the recipe {recipe!r} places nothing on the {mesh.size()} ranks; add partition to it")
    name = unique_name(group)
    is_gpu = device.type != "cpu"
    moves = activations(offload, budget, is_gpu=is_gpu)
    wanted = {name: default_stage if own is None else own for name, own in stages.items()}
    resting = _resting(model, wanted, mesh.size(-1) if mesh is not None else 1, param_dtype)
    offloads = of_parameters(offload, resting, budget, is_gpu=is_gpu)
    if offloads and not fullgraph:
        raise UsageError("fullgraph=False gathers all parameters at once, so that none can be offloaded; offload=None")
    if (group is not None and default_stage) or offloads:
        check_optimizers(model)
    planning = f"recipe {recipe}, param_dtype {param_dtype}, memory_budget {budget}, costs {fingerprint_of(costs)}"
    planning = "\n".join([*settings_lines(str(enabled(pipeline))), planning])
    session = _shard(model, mesh, group, stages, default_stage, param_dtype, planning, name, offloads)
    session.regions = Regions() if kernels == "inductor" else None
    context = Context(
        mesh=_axes(session),
        reduce_dtype=FROM_TORCH[reduce_dtype] if reduce_dtype is not None else None,
        costs=costs,
        memory_budget=budget,
        rest_bytes=session.store.rest_bytes + session.store.state_bytes + buffer_bytes(model),
        update_bytes=session.store.update_bytes,
        groups_calls=is_gpu,
        keeps_blocks=is_gpu,
        recomputes=RECOMPUTES[recompute],
        offloads=moves,
    )
    compiled = CompiledModel(model, session, recipe, context, Path(save) if save is not None else None, replayed)
    compiled.tunes = is_gpu and any(isinstance(step, Fuse) for step in compiled.pipeline.passes)
    own_forward = forward = model.forward
    if fullgraph:
        drop_gradient_hooks(model)
        forward = Frontend(_param_infos(session), lambda: {id(b): n for n, b in model.named_buffers()},
                           compiled.compile_graph, type(model).__name__).wrap(forward, dynamic)  # fmt: skip
    else:
        forward = run_whole(forward, session)
    model.__dict__[ATTRIBUTE] = compiled
    model.__dict__[Unprepared.ATTRIBUTE] = Unprepared()
    model.__dict__["forward"] = guard(forward, session, param_dtype, own_forward)
    if _GENERATES & {base.__name__ for base in type(model).__mro__}:
        own_generate: Any = model.generate
        model.__dict__["generate"] = functools.partial(_generate, model, own_generate)
    model.__dict__["load_state_dict"] = checked_loading(model, session.store)
    model.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
        functools.partial(place_state_dict, session.store)
    )
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without averaging them over the ranks, for all but the last micro-step of a step.

    Gradients of stages 0 and 1 stay on the rank, whole, until the first backward outside. Those of stages 2 and 3 are
    reduced in every micro-step all the same: not to hold them whole is what these stages are for. Whole parameters of
    stages 1 and 2 are gathered once for all micro-steps.

    Raises:
        UsageError: the model is not compiled.
    """
    session = compiled_model(model).session
    before, session.syncs = session.syncs, False
    try:
        yield
    finally:
        session.syncs = before


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all parameters for the length of a `with`: to read them, and to call the model or its parts eagerly.

    All ranks enter it together; within it they do not meet, and may do different things. Each has the whole model in
    its memory there, in the dtype to compute in. No gradients reach the parameters from there, and they must not be
    changed: what is whole anyhow is the parameter itself. `model.generate` of transformers runs so by itself.

    Raises:
        UsageError: the model is not compiled.
        PeerError: another rank failed.
    """
    compiled = compiled_model(model)
    check_moved(compiled.session)
    if is_gathered(model):
        yield
        return
    attributes = model.__dict__
    forward = attributes["forward"]
    attributes["forward"] = compiled.eager
    try:
        with whole_parameters(compiled.session):
            yield
    finally:
        attributes["forward"] = forward


def is_gathered(model: nn.Module) -> bool:
    """Whether a compiled model is within `gathered`."""
    return model.__dict__["forward"] is compiled_model(model).eager


def report(model: nn.Module) -> Report:
    """What was compiled, and why: the recipe, what each pass changed, bytes at rest, at the peak and on the wire.

    Raises:
        UsageError: the model is not compiled.
    """
    return compiled_model(model).report


def recipe(stage: int) -> str:
    """The recipe of a ZeRO stage, to edit and pass as `zgraph.compile(model, passes=...)`.

    Raises:
        UsageError: there is no such stage.
    """
    if stage not in RECIPES:
        raise UsageError(f"stage must be 0, 1, 2 or 3, not {stage!r}")
    return RECIPES[stage]


def compiled_model(model: nn.Module) -> CompiledModel:
    """What `compile` attached to the model. Raises UsageError if it is not compiled."""
    found = model.__dict__.get(ATTRIBUTE) if isinstance(model, nn.Module) else None
    if not isinstance(found, CompiledModel):
        raise UsageError(f"this {type(model).__name__} is not compiled; call zgraph.compile(model) first")
    return found


# --- wiring --------------------------------------------------------------------------------------------------------


def _resting(
    model: nn.Module, wanted: Mapping[str, int], num_shards: int, param_dtype: torch.dtype | None
) -> dict[str, Resting]:
    """What each parameter takes on a rank."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = num_shards if parameter.dim() and wanted[name] else 1
        numel = chunk_numel(tuple(parameter.shape), parts)
        copied = compute_dtype(parameter, param_dtype)
        found[name] = Resting(numel * parameter.element_size(), numel * copied.itemsize)
    return found


def _mesh(model: nn.Module, mesh: DeviceMesh | None) -> DeviceMesh | None:
    if mesh is not None and mesh.ndim == 2 and mesh.size(0) == 1:
        return mesh[mesh.mesh_dim_names[1]] if mesh.mesh_dim_names else mesh
    if mesh is None and not dist.is_initialized() and (problem := check_joined()):
        raise UsageError(problem)
    if mesh is not None or not dist.is_initialized():
        return mesh
    kind = next((p.device.type for p in model.parameters() if not p.is_meta), None)
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and dist.get_backend() == "nccl":
        raise UsageError("the model is on the CPU, but the process group is NCCL's; move the model to its GPU first")
    return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("shard",))


_GENERATES = {"GenerationMixin", "PeftModel"}
"""Classes of transformers and PEFT whose `generate` is called from outside; that of others may be part of a forward."""


def _generate(model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers: ranks need as many tokens as their rows, and lengths are new all the time."""
    with gathered(model):
        return generate(*args, **kwargs)


def _axes(session: Session) -> tuple[Axis, ...]:
    if session.num_ranks == 1:
        return ()
    copies = session.num_ranks // session.num_shards
    return (*[Axis("replicate", copies)] * (copies > 1), Axis("shard", session.num_shards))


# --- wiring ------------------------------------------------------------------------------------------------------


def _compile_class(kind: type[nn.Module], options: Options) -> type[nn.Module]:
    """The class, whose instances (not those of its subclasses) are compiled at the end of `__init__`."""
    make = kind.__init__

    @functools.wraps(make)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if type(self) is kind:
            compile(self, **options)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


def _shard(
    model: nn.Module, mesh: DeviceMesh | None, group: dist.ProcessGroup | None, stages: dict[str, int | None],
    default_stage: int, param_dtype: torch.dtype | None, planning: str, name: str, offloads: dict[str, str],
) -> Session:  # fmt: skip
    """Compare the models of all ranks, then shard."""
    device = next((p.device for p in model.parameters() if not p.is_meta), _default_device(mesh))
    check_initialisable(model)
    if group is not None:
        lines = [planning]
        lines += [
            f"{n}: {tuple(p.shape)} {p.dtype} stage {stages[n]}" + (f" offload {offloads[n]}" if n in offloads else "")
            for n, p in model.named_parameters()
        ]
        lines += [f"{n}: {tuple(b.shape)} {b.dtype} buffer" for n, b in model.named_buffers()]
        Peers(group, name, device).agree("model", "\n".join(lines))
    host = HostMemory(device)
    store = ShardStore(model, mesh, group, stages, default_stage, param_dtype, device, offloads, host)
    materialise_buffers(model, device)
    if group is not None:
        for buffer in model.buffers():
            buffer.detach().copy_(store.from_first_rank(buffer))
    return Session(store, group, name)


def _default_device(mesh: DeviceMesh | None) -> torch.device:
    kind = mesh.device_type if mesh is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _param_infos(session: Session) -> dict[int, ParamInfo]:
    infos = {}
    for slot in session.store.slots.values():
        at_rest, computed = slot.rest.dtype, slot.stand_in.dtype
        master = FROM_TORCH[at_rest] if at_rest != computed else None
        hollow = slot.stand_in is not slot.parameter
        infos[id(slot.stand_in)] = ParamInfo(slot.name, slot.stage, master, hollow, slot.offload)
    return infos


__all__ = ["CompiledModel", "compile", "compiled_model", "gathered", "no_sync", "recipe", "report"]
