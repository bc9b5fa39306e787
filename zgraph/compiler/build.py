"""From a model and its settings to one that is compiled when it is called: its shards first, then what runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from torch import nn

from zgraph.bridge.aten import FROM_TORCH
from zgraph.bridge.private_inductor import warm
from zgraph.bridge.private_pause import inline_only_when_called
from zgraph.bridge.private_runtime import whole_group
from zgraph.bridge.target import allocator_advice, library_bytes
from zgraph.capture import Frontend, ParamInfo, drop_gradient_hooks
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.compiler.bucketing import bucketed
from zgraph.compiler.call_guard import guard
from zgraph.compiler.compiled_model import CompiledModel, buffer_bytes, enabled
from zgraph.compiler.copying import Copier, refuse_sharing
from zgraph.compiler.first_batch import agreeing
from zgraph.compiler.narrator import Narrator
from zgraph.compiler.plan_folder import plan_folder
from zgraph.compiler.plan_key import settings_text
from zgraph.compiler.plans import Plans
from zgraph.compiler.replanning import FirstRun, replanning
from zgraph.compiler.step_recorder import StepRecorder
from zgraph.compiler.trace_folder import KeptTraces
from zgraph.environment import environment
from zgraph.ir import Axis, in_use
from zgraph.options.settings import Settings
from zgraph.options.validate import ATTRIBUTE
from zgraph.passes import Context
from zgraph.passes.code_gathers import CodeGathers
from zgraph.passes.compress import Compress
from zgraph.passes.fuse import Fuse
from zgraph.runtime import HostMemory, Session, ShardStore
from zgraph.runtime.agreement import settings_lines
from zgraph.runtime.alike import same_batches
from zgraph.runtime.eager_fallback import eager_fallback
from zgraph.runtime.gradients import attached, watch_steps
from zgraph.runtime.interrupts import say_little
from zgraph.runtime.loading import checked_loading, place_state_dict
from zgraph.runtime.materialise import check_initialisable, materialise_buffers
from zgraph.runtime.peers import Peers, unique_name
from zgraph.runtime.pieces import Placeholder, in_pieces
from zgraph.runtime.regions import Regions
from zgraph.runtime.structure import Structure

ADAPTERS = ("zgraph.hf.adapt",)
"""Modules that adapt a compiled model to a library which treats some models specially.

Each has `adapt(model)`, and `ready(model)`, which prepares the model for a capture and tells whether it changed it.
"""

for _folder in ("bridge", "codegen", "compiler", "optim", "runtime"):
    inline_only_when_called(f"{Path(__file__).parents[1] / _folder}/")  # what a step under torch.compile has run

_advised: set[str] = set()
"""Advice that this process has given."""


def shard(model: nn.Module, settings: Settings) -> Session:
    """Compare the models of all ranks, then shard.

    Raises:
        PlanMismatchError: the ranks have different models or settings.
        UsageError: a parameter or buffer without memory cannot be initialised.
        OffloadError: the host has no room for what is offloaded.
    """
    mesh, device = settings.mesh, settings.device
    group = whole_group(mesh) if mesh is not None else None
    name = unique_name(group)
    check_initialisable(model)
    if group is not None:
        Peers(group, name, device).agree("model", _described(model, settings))
    store = ShardStore(
        model,
        mesh,
        group,
        dict(settings.stages),
        settings.default_stage,
        settings.param_dtype,
        device,
        dict(settings.offloads),
        HostMemory(device),
        Placeholder if settings.fullgraph is False else nn.Parameter,
        settings.cuts,
    )
    materialise_buffers(model, device)
    store.place_buffers()
    if group is not None:
        store.share_buffers()
    session = Session(store, group, name)
    session.reduce_dtype = settings.reduce_dtype
    return session


def attach(model: nn.Module, settings: Settings, session: Session) -> None:
    """Put in the place of the model's forward one that compiles what it captures."""
    told = environment().logs if session.store.rank == 0 else ()
    narrator = Narrator(
        type(model).__name__, model.forward, told, _where(settings, session), in_pieces=settings.fullgraph is False
    )
    if (words := allocator_advice(session.device)) and words not in _advised:
        _advised.add(words)
        narrator.remark(words)
    folder = plan_folder()
    compiled = CompiledModel(
        model,
        session,
        settings.pipeline,
        _context(model, settings, session),
        settings.save,
        settings.replayed,
        Regions() if settings.compiles_regions else None,
        tunes=settings.is_gpu and any(isinstance(step, Fuse) for step in settings.pipeline.passes),
        narrator=narrator,
        trial=functools.partial(FirstRun, may_repeat=settings.fullgraph is True),
        kernels=settings.kernels,
        cuda_graphs=settings.cuda_graphs,
        region_calls=settings.regions,
        placements=settings.search,
        record=StepRecorder(settings.record, session) if settings.record is not None else None,
        plans=Plans(session, settings_text(settings), folder),
    )
    if settings.remark:
        narrator.remark(settings.remark)
    if settings.compiles_regions and settings.is_gpu:
        warm()
    compiled.traces = KeptTraces(folder and replace(folder, suffix=".trace"), compiled.trace_salt)
    copier = Copier(model, functools.partial(_again, settings))
    own_forward = forward = model.forward
    forget: Callable[[], None] | None = None
    structure = Structure(session.store)
    if settings.fullgraph is False:  # a piece would end where `ready` is needed
        _make_ready(model, structure)
    say_little()
    if settings.offloads or not session.is_alone:
        watch_steps(session)
    if settings.fullgraph != "eager":
        drop_gradient_hooks(model)
        frontend = Frontend(
            _param_infos(session),
            lambda: {id(b): n for n, b in model.named_buffers()},
            compiled.compile_graph,
            type(model).__name__,
            lambda run, parameters: attached(run, parameters, session),
            narrator.left_eager,
            lambda: _make_ready(model, structure),
            returns_parts=session.store.ranks.num_batches > session.num_ranks,
            traces=compiled.traces if settings.fullgraph else None,
        )
        forward, forget = frontend.wrap(forward, settings.dynamic, fullgraph=settings.fullgraph), frontend.forget
        if not settings.fullgraph:
            forward = in_pieces(forward, session)
        forward = narrator.watched(forward)
        forward = replanning(forward, compiled, frontend.forget, may_repeat=settings.fullgraph is True)
    else:
        forward = eager_fallback(forward, session)
    if session.store.ranks.num_model:
        forward = same_batches(forward, session)
    model.__dict__[ATTRIBUTE] = compiled
    forward = guard(forward, session, settings.param_dtype, own_forward, forget, structure)
    if not session.is_alone and settings.fullgraph != "eager" and settings.dynamic is not False:
        forward = agreeing(model, forward, session, structure)
    if settings.lengths is not None:
        forward = bucketed(model, forward, session, settings.lengths)
    model.__dict__["forward"] = forward
    model.__dict__["load_state_dict"] = checked_loading(model, session.store, session.copies.forget)
    copier.handles.append(model.register_load_state_dict_pre_hook(place_state_dict))  # type: ignore[no-untyped-call]
    copier.handles.append(model.register_state_dict_pre_hook(lambda *_: session.raise_doom()))  # type: ignore[no-untyped-call]
    model.__dict__["share_memory"] = refuse_sharing
    for name in ADAPTERS:
        import_module(name).adapt(model)
    copier.attach(session)
    compiled.plain = functools.partial(copier.plain, session)


def _make_ready(model: nn.Module, structure: Structure) -> bool:
    """Prepare a model for a capture as its library wants it; whether that changed it."""
    changed = [name for name in ADAPTERS if import_module(name).ready(model)]
    structure.has_new_hooks()  # those that came are no reason to capture again
    return bool(changed)


def _again(settings: Settings, model: nn.Module) -> Session:
    """A copy of a model, compiled as the model was. Its steps are not recorded."""
    settings = replace(settings, record=None)
    session = shard(model, settings)
    attach(model, settings, session)
    return session


def _where(settings: Settings, session: Session) -> str:
    """The stages and the ranks, in words."""
    stages = sorted({settings.default_stage if own is None else own for own in settings.stages.values()})
    listed = f"stage{'s' * (len(stages) > 1)} {' and '.join(map(str, stages or [settings.default_stage]))}"
    kernels = f', kernels="{settings.kernels}"' if settings.kernels != "aten" else ""
    axes = session.store.ranks.axes
    model = "".join(f" x {axis.size} of {axis.name}" for axis in axes[: session.store.ranks.num_model])
    return f"{listed} on {session.num_ranks} rank{'s' * (session.num_ranks > 1)}{model}{kernels}"


def _described(model: nn.Module, settings: Settings) -> str:
    """Text of what must be the same on all ranks, one line for each item."""
    stages, offloads = settings.stages, settings.offloads
    lines = [*settings_lines(str(enabled(settings.pipeline))), settings.text]
    lines += [
        f"{n}: {tuple(p.shape)} {p.dtype} stage {stages[n]}" + (f" offload {offloads[n]}" if n in offloads else "")
        for n, p in model.named_parameters()
    ]
    lines += [f"{n}: {tuple(b.shape)} {b.dtype} buffer" for n, b in model.named_buffers()]
    return "\n".join(lines)


def _context(model: nn.Module, settings: Settings, session: Session) -> Context:
    """Context of the passes: mesh, costs, memory and choices."""
    store = session.store
    rest_bytes = store.rest_bytes + store.state_bytes + buffer_bytes(model) + library_bytes(session.device)
    steps = enabled(settings.pipeline).passes
    if any(isinstance(step, Compress) and step.gradients != "none" for step in steps):
        rest_bytes += session.feedback.most_bytes
    for step in steps:
        if isinstance(step, Compress | CodeGathers):
            rest_bytes += session.copies.most_bytes(step.copied, with_own=isinstance(step, Compress))
    return Context(
        mesh=_axes(session),
        reduce_dtype=FROM_TORCH[settings.reduce_dtype] if settings.reduce_dtype is not None else None,
        costs=settings.costs,
        memory_budget=settings.memory_budget,
        rest_bytes=rest_bytes,
        update_bytes=store.update_bytes,
        groups_calls=settings.is_gpu,
        keeps_blocks=settings.is_gpu,
        recomputes=settings.recomputes,
        offloads=settings.moves,
    )


def _axes(session: Session) -> tuple[Axis, ...]:
    return in_use(session.store.ranks.axes)


def _param_infos(session: Session) -> dict[int, ParamInfo]:
    infos = {}
    for slot in session.store.slots.values():
        at_rest, computed = slot.rest.dtype, slot.placeholder.dtype
        master = FROM_TORCH[at_rest] if at_rest != computed else None
        is_placeholder = slot.placeholder is not slot.parameter
        cuts = session.store.ranks.cuts.get(slot.name, ())
        infos[id(slot.placeholder)] = ParamInfo(slot.name, slot.stage, master, is_placeholder, slot.offload, cuts)
    return infos
