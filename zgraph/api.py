"""The door: `zgraph.compile` resolves its options, shards the model, and attaches what compiles its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.dtypes import Dtype
from zgraph.bridge.target import Target
from zgraph.compiler.build import attach, shard
from zgraph.compiler.call_guard import check_moved
from zgraph.compiler.compiled_model import compiled_model, is_gathered
from zgraph.compiler.joining import Joined
from zgraph.compiler.report import Report
from zgraph.errors import UsageError
from zgraph.estimate.layouts import CompileOptions, Parallel, laid_out
from zgraph.options.compression import Compress
from zgraph.options.lengths import Lengths
from zgraph.options.model_plans import Placements
from zgraph.options.offload import Offload
from zgraph.options.settings import Options, Passes, Recompute, resolve
from zgraph.options.validate import Compute, CudaGraphs, Fullgraph, Kernels, RegionCalls, Stage
from zgraph.passes import RECIPES
from zgraph.runtime.decisions import deciding
from zgraph.runtime.eager_fallback import whole_parameters
from zgraph.runtime.feedback import FeedbackState
from zgraph.runtime.gradients import without_sync

M = TypeVar("M")


@overload
def compile(model: M, **options: Unpack[CompileOptions]) -> M: ...
@overload
def compile(model: None = None, **options: Unpack[CompileOptions]) -> Callable[[M], M]: ...
def compile(
    model: Any = None,
    *,
    stage: Stage = 3,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    param_dtype: Dtype | None = None,
    reduce_dtype: Dtype | None = None,
    hardware: Target | None = None,
    memory_budget: int | str | None = None,
    recompute: Recompute = "auto",
    offload: Offload = "auto",
    kernels: Kernels | None = None,
    compute: Compute | None = None,
    compress: Compress = None,
    passes: Passes | None = None,
    save: str | Path | None = None,
    fullgraph: Fullgraph = True,
    dynamic: bool | None = None,
    lengths: Lengths | None = None,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    placements: Placements | None = None,
    parallel: Parallel | None = None,
    cuda_graphs: CudaGraphs = False,
    record: str | Path | None = None,
    regions: RegionCalls = "python",
) -> Any:
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
        device: where to shard the model to, "cuda" say: from the CPU, where it was loaded, or from the meta device. One
            parameter at a time is whole there. By default the device that the model is on.
        param_dtype: dtype to compute in (`torch.bfloat16` or a word for it: "bf16", "bfloat16"), with masters in the
            parameters' own dtype; floating-point inputs are cast.
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
        kernels: "aten" runs all ops one by one, the default on processors; "triton" fuses what is between matmuls into
            generated kernels, which compute in fp32 throughout: on GPUs where they were measured to be faster, in the
            first call (on processors by reference implementations in torch, which save no time); "inductor" has
            torch's Inductor compile what is between collectives, each different piece once, whatever layers it is in;
            "auto", the default on GPUs, is "inductor" with generated kernels in the place of those ops for which they
            were measured to be faster. Where Inductor cannot compile, "auto" is "aten", and a line says why.
        compute: "float8" multiplies the matrices of linear layers in float8, with scales from the numbers at hand: one
            a matrix; "float8-rowwise" with one a row or column, which is more exact. An approximation, by torchao's
            recipes; None multiplies in `param_dtype`. Layers whose sizes are no multiples of 16, and the projection to
            the vocabulary, stay as they are; the report names them. GPUs need compute capability 8.9.
        compress: a codec of gradients on the wire: "q8(block=256)", "q4(block=128)", "q2(block=128)",
            "sign(block=256)" or "topk(1%, chunk=4096)". Ranks exchange codes, and the owner of each part adds in fp32
            what they stand for.
            What a code leaves out is kept on the rank, in fp32 as large as the model, and sent with the next
            (`zgraph.feedback(model)` is what checkpoints save). "auto" takes the mildest of `q8` and `q4` that hides
            what is sent about as well as any, or none where that saves less than 5 % of the predicted step; the report
            says why. An approximation: None, the default, sends the numbers. "exact" codes gathers of parameters in
            bf16, without any change of numbers, where that saves 2 % of the step: "delta" what changed since the last
            copy, at stages 1 and 2, and "exponent" exponents, at stage 3. {"gradients": "q4", "parameters": "q8"} has a
            codec for each, and either may be left out: parameters are "exact", or gathered in that codec, at stages 1
            and 2 as the difference from the last copy, at stage 3 as they are (`q8` and `q4`).
        passes: a recipe in the place of the stage's own (`zgraph.recipe(stage)` gives that), a `Pipeline`, or a
            sequence of passes, your own among them (`zgraph.register_pass` lets recipes name these); or the path of a
            run file (`run.zg`), whose last graph is run as it is, if the model is captured as it was for that file.
        save: where to write a run file: the captured graph, the graph after every pass, and what the passes knew.
        fullgraph: False captures a forward in pieces where it cannot be one graph. Each piece is sharded, with its own
            gathers; eager code between two has a parameter gathered for each op that reads it. The ranks must go the
            same way. "eager" captures nothing: everything is gathered from the call to the end of the backward, with a
            warning, and each rank may go its own way.
        dynamic: as in `torch.compile`: None learns which sizes change, True takes them all as symbols at once.
        lengths: a few lengths that inputs are padded to, each captured once with static shapes: see `zgraph.Lengths`.
        tensor_parallel: ranks that compute each op together, neighbours in rank, on one batch. Parameters are cut over
            them, and what is left of each is sharded over the other ranks as its stage says.
        sequence_parallel: with `tensor_parallel`, whether activations between blocks lie cut along the sequence: less
            memory, for as many bytes sent.
        context_parallel: ranks that share each sequence of one batch: each computes a part of it, and attention some
            heads of all of it. Parameters are sharded over them as over the other ranks.
        expert_parallel: ranks that share the experts of a mixture, each with a batch of its own, of one shape: each
            computes its rows, and some experts for the tokens of all. What the model returns is of these rows, but a
            loss is that of all of them. Other parameters are sharded over them as over the other ranks.
        placements: how parameters are cut, from patterns of their names to `Shard(dim)` of torch (`"S1/3"` cuts dim 1
            of a fused projection in each of three blocks); what none names stays whole. By default, the plan that
            transformers has for the model. "auto" searches for them, and for where all values between them are, with
            the hardware's costs; so does `zgraph.search_placements` for inputs of your own.
        parallel: "auto" chooses the stage and the sizes of these axes for the hardware, the ranks and the memory
            budget, so that all ranks train on the most tokens in a second, and the report says why. A stage other than
            3 is kept. So does a plan of `zgraph.plan(model, ..., parallel="auto")`, for inputs of your own.
        cuda_graphs: True records on a GPU what each program does between its collectives, in its third run, and has the
            GPU repeat it from then on, which saves the host the launches. "auto" does so where launching takes the host
            longer than running takes the device. What cannot be recorded runs op by op; the report says why. It takes
            more memory, since recordings keep theirs.
        record: a folder in which each rank keeps what its steps take, for `zgraph.calibrate` and `zgraph plan --check`:
            a time for each step, and one for each node in the steps 4, 16, 64 and so on, which run op by op. It is of
            the first training graph.
        regions: what calls a region that Inductor compiles on processors: the "python" that it writes for it; or "c++",
            a library that AOTInductor makes of it, which halves the host's time for a call and takes the compiler of
            C++ some ten seconds, once for a cache. "auto" takes the latter where launching a step takes longer than
            running it. A region that cannot be a library is called as before, and the report says why.

    Returns:
        The model, the class, or a decorator.

    Raises:
        UsageError: an option means nothing, or the model cannot be sharded as asked.
        AlreadyCompiledError: the model, or a part of it, is compiled already.
        CodecError: the codec does not parse.
        RecipeError, ContractError: the recipe does not parse or does not fit together.
        RunFileError: the run file is none, or (in the first call) of another model.
        DtypeError: a dtype is none, or no floating-point one.
        HardwareError: there is no such hardware.
        OffloadError: the host has no room for what is offloaded; nothing was changed.
        PlanMismatchError: the ranks have different models or options.
        PeerError: another rank raised one of these.
        PlacementError: a parameter does not divide; or in the first call, a sequence or heads of attention.

    The first call raises BudgetError if even with all computed again the step does not fit the budget.
    """
    options: Options = {
        "stage": stage,
        "mesh": mesh,
        "device": device,
        "param_dtype": param_dtype,
        "reduce_dtype": reduce_dtype,
        "hardware": hardware,
        "memory_budget": memory_budget,
        "recompute": recompute,
        "offload": offload,
        "kernels": kernels,
        "compute": compute,
        "compress": compress,
        "passes": passes,
        "save": save,
        "fullgraph": fullgraph,
        "dynamic": dynamic,
        "lengths": lengths,
        "tensor_parallel": tensor_parallel,
        "sequence_parallel": sequence_parallel,
        "context_parallel": context_parallel,
        "expert_parallel": expert_parallel,
        "placements": placements,
        "cuda_graphs": cuda_graphs,
        "record": record,
        "regions": regions,
    }
    if model is None:
        return functools.partial(compile, parallel=parallel, **options)
    if isinstance(model, type) and issubclass(model, nn.Module):
        return _compile_class(model, options, parallel)
    if not isinstance(model, nn.Module):
        raise UsageError(f"zgraph.compile takes a module or a module class, not {type(model).__name__}")
    layout = ""
    with deciding(mesh) as meet:
        if parallel is not None:
            options, layout = laid_out(model, parallel, options, meet)
        settings = resolve(model, **options, layout=layout, meet=meet)
    session = shard(model, settings)
    attach(model, settings, session)
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without averaging them over the ranks, for all but the last micro-step of a step.

    Gradients of stages 0 and 1 stay on the rank, whole, until the first backward outside or `optimizer.step()`. They
    are in `.grad`, of a sharded parameter as a DTensor that is `Partial`. Gradients of stages 2 and 3 are reduced in
    every micro-step all the same: not to hold them whole is what these stages are for. Whole parameters of stages 1 and
    2 are gathered once for all micro-steps. Post-accumulate hooks wait for the first backward outside.

    Raises:
        UsageError: the model is not compiled.
    """
    with without_sync(compiled_model(model).session):
        yield


@contextmanager
def join(model: nn.Module) -> Iterator[Joined]:
    """Train with loaders that have other numbers of batches on each rank.

        with zgraph.join(model) as joined:
            for batch in joined(loader):
                model(batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    A rank whose loader is over runs the loop on with its last batch, and its gradients count as zeros, until every
    loader is. So it takes part in all that the loop's body does: gathers, clipping, the optimizer's step over its own
    shards, schedulers. Gradients are divided by the number of all ranks, as DDP's Join does by default. Losses of ranks
    that are over are for nobody: `joined.is_over` tells. Buffers are the first rank's as ever, of its last batch too.

    Raises:
        UsageError: the model is not compiled.
        PeerError: another rank failed, or left the loop.
    """
    session = compiled_model(model).session
    try:
        yield Joined(session)
    finally:
        session.adds_nothing = False


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all parameters for the length of a `with`: to read them, and to call the model or its parts eagerly.

    All ranks enter it together; within it they do not meet, and may do different things. Each has the whole model in
    its memory there, in the dtype to compute in. No gradients reach the parameters from there, and they must not be
    changed: what is whole in any case is the parameter itself. `model.generate` of transformers runs so by itself.

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


def report(model: nn.Module) -> Report:
    """Report of a compiled model: its recipe, what each pass changed, bytes at rest, at the peak and on the wire.

    Raises:
        UsageError: the model is not compiled.
    """
    return compiled_model(model).report


def feedback(model: nn.Module) -> FeedbackState:
    """Rests that the codes of a model's gradients have left out so far (`compress=`), as a part of a checkpoint.

        torch.distributed.checkpoint.save({"model": model.state_dict(), "feedback": zgraph.feedback(model)}, ...)

    It has `state_dict` and `load_state_dict`: a tensor for each parameter, in fp32, placed as that is, which any number
    of ranks loads. Saving is a call of all ranks. It splits what is due evenly over them, so that training goes on from
    what is saved. Without `compress=` all is zero.

    Raises:
        UsageError: the model is not compiled.
    """
    return FeedbackState(compiled_model(model).session.feedback)


def recipe(stage: int) -> str:
    """The recipe of a ZeRO stage, to edit and pass as `zgraph.compile(model, passes=...)`.

    Raises:
        UsageError: there is no such stage.
    """
    if stage not in RECIPES:
        raise UsageError(f"stage must be 0, 1, 2 or 3, not {stage!r}")
    return RECIPES[stage]


def _compile_class(kind: type[nn.Module], options: Options, parallel: Parallel | None) -> type[nn.Module]:
    """The class, whose instances (not those of its subclasses) are compiled at the end of `__init__`."""
    make = kind.__init__

    @functools.wraps(make)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if type(self) is kind:
            compile(self, parallel=parallel, **options)

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


__all__ = ["compile", "feedback", "gathered", "join", "no_sync", "recipe", "report"]
