"""`zgraph.infer`: a model as programs for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.private_inductor import inductor_problem
from zgraph.errors import UsageError
from zgraph.inference.apart import integers_apart
from zgraph.inference.calibration import OUTLIERS, Calibrate, check_wider, left_wide, outlier_columns, rounded_integers
from zgraph.inference.calls import Calls
from zgraph.inference.decoder import Step, check_max_len, decoder_step, kept_in
from zgraph.inference.forwards import Inference
from zgraph.inference.generation import Generator
from zgraph.inference.programs import Programs
from zgraph.inference.seq2seq import Seq2Seq, Seq2SeqStep, seq2seq_step
from zgraph.inference.slots import Arena
from zgraph.inference.storage import is_stored, stored_integers
from zgraph.ir import Shard
from zgraph.options.model_plans import Placements
from zgraph.options.parallel import AXIS, cuts_of, mesh_of
from zgraph.options.validate import ATTRIBUTE, CudaGraphs, RegionCalls, check_cuda_graphs, check_region_calls
from zgraph.passes import parse_recipe
from zgraph.passes.analysis.integers import integers_of, outliers_of
from zgraph.passes.quantise import GROUPS, Quantise
from zgraph.runtime.decisions import alone, deciding

RECIPE = "canonicalize,grouped-heads,dce,in-place"
"""The passes for a model whose weights stay as they are."""

PARALLEL = "canonicalize,grouped-heads,dce,place,partition(stage=0),exchange,dce,in-place"
"""The passes for one that several ranks compute together."""

WEIGHTS, ACTIVATIONS, KERNELS = ("int8", "int4"), ("int8",), ("aten", "inductor")
"""Values of options beside None."""


def recipe_of(
    weights: str | None,
    activations: str | None,
    group: int,
    *,
    is_calibrated: bool = False,
    left_wide: Sequence[str] = (),
) -> str:
    """The passes for a model whose weights are kept so.

    Args:
        weights, activations, group: as of `infer`.
        is_calibrated: whether integers of int4 are there already, as `is_calibrated` says.
        left_wide: layers that int4 leaves in int8, beside those that it always does.

    Raises:
        UsageError: the options mean nothing, alone or together.
    """
    for name, value, known in (("weights", weights, WEIGHTS), ("activations", activations, ACTIVATIONS)):
        if value is not None and value not in known:
            raise UsageError(f"{name} must be None or one of {', '.join(known)}, not {value!r}")
    if activations is not None and weights != "int8":
        raise UsageError('activations="int8" multiplies integers with integers: pass weights="int8" too')
    if group not in GROUPS:
        raise UsageError(f"group must be one of {', '.join(map(str, GROUPS))}, not {group!r}")
    if weights is None:
        return RECIPE
    options = {
        "weights": weights,
        "activations": activations,
        "group": group if weights == "int4" else None,
        "outliers": OUTLIERS if activations is not None else None,
        "wider": "+".join((Quantise.wider, *left_wide)) if left_wide else None,
        "calibrated": "true" if weights == "int4" and is_calibrated else None,
    }
    text = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    return RECIPE.replace("canonicalize,", f"canonicalize,quantise({text}),")


def is_calibrated(model: nn.Module, calibrate: Calibrate, group: int) -> bool:
    """Whether integers of int4 are constants: there is something to calibrate with, or a folder had them."""
    return calibrate is not None or is_stored(model, group)


def seen_of(
    model: nn.Module,
    weights: str | None,
    activations: str | None,
    group: int,
    calibrate: Calibrate,
    wider: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The constants that the passes need of what a model's layers are given, by their targets in graphs.

    Raises:
        UsageError: there is something to calibrate with, and nothing to calibrate; or the model cannot be called so.
        QuantisationError: a layer's columns or outputs do not fit the integers.
    """
    if activations is not None:
        return {outliers_of(weight): columns for weight, columns in outlier_columns(model, calibrate).items()}
    if calibrate is None:
        integers = stored_integers(model, group) if weights == "int4" and is_stored(model, group) else {}
    elif weights == "int4":
        integers = rounded_integers(model, calibrate, group, wider)
    else:
        raise UsageError(
            'calibrate= rounds weights="int4", and shows where activations="int8" has outliers; leave it out, or pass '
            "one of these too"
        )
    return {t: v for weight, both in integers.items() for t, v in zip(integers_of(weight), both, strict=True)}


def layers_left_wide(model: nn.Module, calibrates: bool, beside: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The layers that int4 leaves in int8 as their integers are not among those that are there."""
    if not calibrates:
        return ()
    return left_wide(model, {name for name, _ in model.named_parameters() if integers_of(name)[0] in beside})


def check_kv(kv: str | None) -> None:
    """Refuse what keys and values cannot be kept in. Raises UsageError."""
    if kv not in (None, "int8"):
        raise UsageError(f"kv must be None or int8, not {kv!r}")


def infer(
    model: nn.Module,
    *,
    max_batch: int | None = None,
    max_len: int | None = None,
    weights: str | None = None,
    activations: str | None = None,
    group: int = 64,
    kernels: str = "aten",
    tensor_parallel: int | None = None,
    placements: Placements | None = None,
    max_source: int | None = None,
    kv: str | None = None,
    cuda_graphs: CudaGraphs = False,
    regions: RegionCalls = "python",
    calibrate: Calibrate = None,
    wider: float = 0.0,
) -> Inference:
    """A model for inference: its prefill and decode captured and linked, to run over a cache with fixed places.

        inference = zgraph.infer(model, max_batch=8, max_len=512)
        tokens = inference.generate(ids, attention_mask, max_new_tokens=64)

    Nothing of torch.compile runs for a token. The model itself is not changed, and where its weights are written to,
    the next call computes with the new ones. What cannot generate here (an encoder, a plain module) has plain forwards:
    `inference(input_ids=ids)`, captured at the first call of each shape.

    Args:
        model: a causal language model of transformers, an encoder with a decoder, or any module, on one device.
        max_batch: rows to generate for at once; None takes one. A call with fewer rows takes as long as one with all.
        max_len: tokens of a row, the prompt's among them; None takes 1,024, or what the model was made for if that is
            less.
        weights: what they are kept in: None leaves them; "int8" has a scale for each output of a layer; "int4" one for
            each group of columns, and int8 for embeddings and the projection to the vocabulary. Both are approximate.
        activations: "int8" rounds each token's before it meets a weight in int8, which is faster, and less exact. The
            columns of each layer that have the largest are kept.
        calibrate: what the model is called with once: tokens of a text, int64 [tokens] or [rows, tokens], or all inputs
            of its forward by name. Weights in int4 are rounded by GPTQ then; None rounds to the nearest. Activations in
            int8 keep the columns that are largest in it; None takes tokens drawn from the vocabulary.
        wider: share of the weights in int4 that stay in int8: those whose rounding moves the model's distribution most
            for their size, as `calibrate` shows.
        kv: "int8" keeps keys and values in int8, with a scale for each head of each token. Approximate.
        group: columns that share a scale in int4: 32, 64 or 128.
        kernels: what runs the ops: "aten", torch's own; or "inductor", those between writes compiled together.
        tensor_parallel: ranks that compute each op together, all of the job's: each has some heads, with their part of
            the cache, and some columns of each MLP. They are called with the same prompts, and give the same tokens.
            A number, 1 too, is given by all ranks of the job alike; None is for this rank alone, whatever others do.
        max_source: tokens that an encoder takes; None takes 512. Sources of features have one size, and take none.
        placements: how parameters are cut over these ranks, as of `zgraph.compile`; None takes the model's own plan.
        cuda_graphs: True records on a GPU the decode of a token of each row in its third run, and plain forwards, and
            has the GPU repeat that; "auto" does so where launching takes the host longer than running takes the device,
            by the hardware's figures; False does not. `Inference.cuda_graphs` says what became of it.
        regions: what calls a region that Inductor compiles: "python", "c++" or "auto", as of `zgraph.compile`.

    Raises:
        UsageError: an option means nothing, or the model is compiled already or has no cache.
        PlacementError: a parameter does not divide over the ranks.
        PlanMismatchError: the ranks have different models or options.
        PeerError: another rank raised one of these.
        QuantisationError: a layer's columns or outputs do not fit the integers.
        InferenceError: the model does not compute with such a cache what it computes without.
        GraphBreakError, CaptureError: a call cannot be captured as one graph.
    """
    with deciding(None) if tensor_parallel is not None else nullcontext(alone) as meet:
        device = _check_model(model)
        if max_batch is not None and (isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1):
            raise UsageError(f"max_batch is a number of rows above 0, not {max_batch!r}")
        if kernels not in KERNELS:
            raise UsageError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
        check_kv(kv)
        check_wider(wider, weights, calibrate)
        check_cuda_graphs(cuda_graphs, True, device)
        check_region_calls(regions, kernels, device)
        records = cuda_graphs if device.type == "cuda" else False
        calibrates = is_calibrated(model, calibrate, group) and weights == "int4"
        recipe_of(weights, activations, group)  # which checks them
        if kernels == "inductor" and (problem := inductor_problem(device)):
            raise UsageError(f'kernels="inductor" cannot compile here: {problem}; kernels="aten" needs nothing')
        meet("mesh", f"tensor_parallel={tensor_parallel}")
        mesh = mesh_of(device, None, {AXIS: 1 if tensor_parallel is None else tensor_parallel})
        if mesh is None and placements is not None:
            raise UsageError("placements= says how ranks share parameters; pass tensor_parallel= too")
        if mesh is not None:
            if max_source is not None:
                raise UsageError("tensor_parallel= is for decoders; leave it or max_source= out")
            if activations is not None or kernels != "aten":
                raise UsageError(
                    'tensor_parallel= is for activations as they are, and kernels="aten": leave activations= and '
                    "kernels= out"
                )
            if calibrate is not None and weights != "int4":
                raise UsageError('calibrate= rounds weights="int4"; leave it out, or pass that too')
            if wider:
                raise UsageError("wider= is for one rank; leave it or tensor_parallel= out")
    if mesh is not None:
        kept = Kept(weights, group, kv, calibrate)
        return _parallel(model, mesh, placements, max_batch or 1, max_len, records, kept)
    compiles, beside = kernels == "inductor", seen_of(model, weights, activations, group, calibrate, wider)
    wide = layers_left_wide(model, calibrates, beside)
    pipeline = parse_recipe(recipe_of(weights, activations, group, is_calibrated=calibrates, left_wide=wide))
    programs = Programs(
        model, pipeline, device, compiles=compiles, cuda_graphs=records, region_calls=regions, beside=beside
    )
    kind, why_not = type(model).__name__, _why_not(model)
    was_training = model.training
    model.eval()
    try:
        has_source = not why_not and bool(getattr(model.config, "is_encoder_decoder", False))
        if max_source is not None and not has_source:
            raise UsageError(f"{kind} has no use for max_source: it is no encoder with a decoder")
        step: Step | Seq2SeqStep | str = why_not
        if has_source:
            step = seq2seq_step(model, check_max_len(model, max_len), max_source)
        elif not why_not:
            step = decoder_step(model, check_max_len(model, max_len))
        if kv is not None and not isinstance(step, Step):
            raise UsageError(
                f"{kind} has no use for kv={kv!r}: {step if isinstance(step, str) else 'it has two caches'}"
            )
        if isinstance(step, str):
            if max_batch is not None or max_len is not None:
                raise UsageError(f"{kind} has no use for max_batch and max_len: {step}")
            return Inference(lambda: model, kind, programs, step)
        if isinstance(step, Seq2SeqStep):
            return Seq2Seq(model, step, programs, max_batch or 1)
        step = kept_in(step, kv)
        arena = Arena(step.shapes, max_batch or 1, step.max_len + 1, device)
        return Generator(model, Calls(model, step, programs, arena, max_batch or 1))
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Kept:
    """Dtypes of weights, keys and values in memory, as of `infer`."""

    weights: str | None
    group: int
    kv: str | None
    calibrate: Calibrate


def _apart(kept: Kept) -> str:
    """The pass for weights in integers of which ranks have parts."""
    group = f", group={kept.group}" if kept.weights == "int4" else ""
    return f"quantise(weights={kept.weights}{group}, apart=true)"


def _parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    placements: Placements | None,
    max_batch: int,
    max_len: int | None,
    cuda_graphs: CudaGraphs,
    kept: Kept,
) -> Inference:
    """A model that the ranks of a mesh compute together."""
    kind, num_ranks = type(model).__name__, mesh.size(0)
    if mesh.size(-1) > 1:
        raise UsageError(
            f"tensor_parallel={num_ranks} is for all {mesh.size()} ranks of the job; pass that, or start fewer"
        )
    was_training = model.training
    model.eval()
    try:
        with deciding(None):
            step = _why_not(model) or decoder_step(model, check_max_len(model, max_len))
            if isinstance(step, str):
                raise UsageError(f"{kind} cannot generate over several ranks: {step}")
            step = kept_in(step, kept.kv)
            shapes = [shape.part(num_ranks) for shape in step.shapes]
            names = [f"cache.{number}.{what}" for number, shape in enumerate(shapes) for what in shape.tensors(0, 0)]
            cuts = {**cuts_of(model, placements, num_ranks, mesh.size(-1)), **dict.fromkeys(names, ((AXIS, Shard(1)),))}
            device, recipe, beside = next(model.parameters()).device, PARALLEL, dict[str, torch.Tensor]()
            if kept.weights is not None:
                recipe = recipe.replace("canonicalize,", f"canonicalize,{_apart(kept)},")
                beside, where = integers_apart(model, kept.weights, kept.group, kept.calibrate, cuts, num_ranks)
                cuts |= where
        programs = Programs(
            model,
            parse_recipe(recipe),
            device,
            compiles=False,
            cuda_graphs=cuda_graphs,
            mesh=mesh,
            cuts=cuts,
            beside=beside,
        )
        arena = Arena(shapes, max_batch, step.max_len + 1, device)
        return Generator(model, Calls(model, step, programs, arena, max_batch))
    finally:
        model.train(was_training)


def _why_not(model: nn.Module) -> str:
    """Why a model cannot generate here, as far as its configuration tells; empty where it may."""
    config = getattr(model, "config", None)
    if not callable(getattr(model, "can_generate", None)) or config is None:
        return "it is no causal language model of transformers"
    if not model.can_generate() or model.get_output_embeddings() is None:  # type: ignore[operator]
        return "it has no head that gives tokens; take its ...ForCausalLM"
    return ""


def _check_model(model: nn.Module) -> torch.device:
    """The device of a model that can be captured for inference."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"infer takes a module, not a {type(model).__name__}")
    if ATTRIBUTE in model.__dict__:
        raise UsageError(
            f"this {type(model).__name__} is compiled for training; save it with zgraph.export_hf, and pass "
            "a plain one that loads it"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise UsageError(
            f"{type(model).__name__} is on {', '.join(sorted(map(str, devices))) or 'no device'}; infer takes a model "
            "whose weights are on one device"
        )
    return devices.pop()
