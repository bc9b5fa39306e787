"""A model's forward as a file for other runtimes: a program of torch.export, or ONNX.

Before anything is written, what the file will compute is compared with what the model does.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.bridge.private_onnx import dequantised
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import CaptureError, InferenceError, UsageError
from zgraph.inference.exported_layers import in_int8, scaled
from zgraph.options.validate import ATTRIBUTE
from zgraph.runtime.decisions import deciding
from zgraph.runtime.eager_fallback import full

UNBOUNDED = 1 << 31
"""A size that none is above: torch.export's own bound of one that it did not limit is larger."""

FORMATS = (".pt2", ".onnx")
"""Ends of files' names: a program of torch.export, and ONNX."""

TOLERANCE = 1e-4
"""The largest difference from the model's own numbers, as a part of the largest of these."""

MAX_INLINE_BYTES = 1 << 30
"""Weights beside which a file of ONNX, which has 2 GiB at most, keeps them in a second one."""

ACCURACY = "session.qdq_matmulnbits_accuracy_level"
"""An option of onnxruntime's sessions: by default activations are rounded to int8 where weights are; by "1" not."""

Dynamic = Mapping[str, Sequence[int]]
"""The dims of inputs that may have other sizes than in the examples, by name."""


def export_model(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    dynamic: Dynamic | None = None,
    weights: str | None = None,
) -> None:
    """Write a model's forward, in eval mode and without a cache, for other runtimes.

        zgraph.export_model(model, {"input_ids": ids, "attention_mask": mask}, "model.onnx",
                            dynamic={"input_ids": (0, 1), "attention_mask": (0, 1)})

    `model.pt2` is a program that `torch.export.load` reads, `model.onnx` one for onnxruntime and others; above 1 GiB,
    its weights are in `model.onnx.data`. Outputs are tensors by name, in the order of the model's own. The file is
    there only once it computed what the model does, on the examples.

    Args:
        model: a plain module, or one that `zgraph.compile` made: all ranks call this then, each parameter is gathered
            from its shards once, and the first rank, which must have room for all, writes.
        inputs: examples of the forward's arguments by name, without padding: what is there for it means nothing.
        path: of the file, whose name ends in .pt2 or .onnx.
        dynamic: dims of inputs that may have other sizes; sizes that must be equal are found. Each is 2 at least in the
            examples.
        weights: "int8" keeps those of linear layers and embeddings in int8 with a scale for each output; in ONNX they
            are inputs of DequantizeLinear. Approximate: compared is with a model of these numbers. onnxruntime rounds
            activations too, unless its session is told `session.qdq_matmulnbits_accuracy_level` "1". None leaves them.

    Raises:
        UsageError: an option or an input means nothing, the model cannot be called so, or the packages that ONNX needs
            are not there.
        CaptureError: the forward cannot be captured as one graph, or not for all sizes of `dynamic`.
        InferenceError: the file computes other numbers than the model, or an output is no tensor.
        PeerError: another rank failed, or does not call this.
    """
    target = Path(path)
    with deciding(None) if isinstance(model, nn.Module) and ATTRIBUTE in model.__dict__ else nullcontext():
        _check_options(model, inputs, target, dynamic or {}, weights)
    plain = _whole(model) if ATTRIBUTE in model.__dict__ else model
    if plain is None:
        return  # the first rank writes
    was_training = plain.training
    plain.eval()
    try:
        _write(plain, dict(inputs), target, dynamic or {}, weights)
    finally:
        plain.train(was_training)


def _check_options(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], target: Path, dynamic: Dynamic, weights: str | None
) -> None:
    """Refuse what means nothing, before ranks wait for each other. Raises UsageError."""
    if target.suffix not in FORMATS:
        raise UsageError(f"path must end in {' or '.join(FORMATS)}, not {target.name!r}")
    if weights == "int4":
        raise UsageError(
            "int4 has a middle of each group of columns, which ONNX has no place for: pass weights='int8'; or export "
            "what zgraph.inference.storage.load_quantised reads from a folder of int4, in fp32"
        )
    if weights not in (None, "int8"):
        raise UsageError(f"weights must be None or int8, not {weights!r}")
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"export_model takes a module, not a {type(model).__name__}; pass the model that zgraph.infer was given"
        )
    _check_inputs(inputs, dynamic)
    if target.suffix == ".onnx":
        _check_packages()


@torch.no_grad()
def _write(
    model: nn.Module, inputs: dict[str, torch.Tensor], target: Path, dynamic: Dynamic, weights: str | None
) -> None:
    is_onnx = target.suffix == ".onnx"
    forward = _Forward(model if weights is None else in_int8(model, dequantised if is_onnx else scaled), inputs)
    if is_onnx and (narrow := _bfloat16(model, inputs)):
        raise UsageError(f"{narrow} is in bfloat16, which onnxruntime has few ops for: export model.float(), or a .pt2")
    try:
        wanted = forward(**inputs)
    except (TypeError, IndexError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{type(model).__name__} cannot be called with these inputs ({type(error).__name__}: {error}); pass "
            "examples of its forward's arguments by name"
        ) from error
    if is_onnx and (both := sorted(inputs.keys() & wanted.keys())):
        raise UsageError(
            f"{', '.join(both)} is the name of an input and of an output, which ONNX has one of: rename the output, or "
            "write a .pt2"
        )
    free = {name: dict.fromkeys(dynamic.get(name, ()), torch.export.Dim.DYNAMIC) for name in inputs}
    try:
        program = torch.export.export(forward, (), inputs, dynamic_shapes=free)
    except Exception as error:
        what = f" with {', '.join(sorted(dynamic))} of other sizes" if dynamic else ""
        raise CaptureError(
            f"the forward of {type(model).__name__} cannot be exported{what}: {error}\nRewrite what it names, or leave "
            "that out of dynamic="
        ) from error
    _check_ranges(model, program)
    others = list(_other_sizes(forward, program, inputs, dynamic))
    for given, made in ((inputs, wanted), *others):
        _check("the program", program.module()(**given), made)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            made = Path(folder) / target.name
            if is_onnx:
                _write_onnx(program, made, [*wanted])
                for given, own in ((inputs, wanted), *others):
                    _check("the file, in onnxruntime,", _by_onnxruntime(made, given), own)
            else:
                torch.export.save(program, made)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights' first
                file.replace(target.parent / file.name)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}; take another path") from None


def _bfloat16(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str:
    """The name of a tensor in bfloat16; empty where none is."""
    tensors = (*inputs.items(), *model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in tensors if tensor.dtype == torch.bfloat16), "")


class _Forward(nn.Module):
    """A model's forward as other runtimes call it: tensors by name in, tensors by name out.

    Args:
        model: whose forward it is.
        inputs: by name.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters
        fixed = {"use_cache": False} if "use_cache" in takes and "use_cache" not in inputs else {}
        names = [*inputs]

        def forward(*args: torch.Tensor, **named: torch.Tensor) -> dict[str, torch.Tensor]:
            given = dict(zip(names, args, strict=False)) | named
            made = _by_name(model(**given, **fixed))
            mine, once = {id(tensor) for tensor in given.values()}, dict[int, str]()
            for name, tensor in made.items():  # what is given back, or given twice, is another tensor there
                if id(tensor) in mine or once.setdefault(id(tensor), name) != name:
                    made[name] = tensor.clone()
            return made

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward


def _by_name(made: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by name: of a mapping its keys, else `output`, or `output.0` and so on."""
    if isinstance(made, torch.Tensor):
        return {"output": made}
    found = {}
    pairs = made.items() if isinstance(made, Mapping) else ((f"output.{i}", value) for i, value in enumerate(made))
    for name, value in pairs:
        for number, leaf in enumerate(leaves := pytree.tree_leaves(value)):
            if not isinstance(leaf, torch.Tensor):
                raise InferenceError(f"the output {name} has a {type(leaf).__name__}, and other runtimes give tensors")
            found[name if len(leaves) == 1 else f"{name}.{number}"] = leaf
    return found


def _check_ranges(model: nn.Module, program: Any) -> None:
    """Refuse a program of some sizes alone. Raises CaptureError."""
    for symbol, found in program.range_constraints.items():
        low, high = found.lower, found.upper
        if low > 2 or high < UNBOUNDED:
            most = f" and to {high}" if high < UNBOUNDED else ""
            raise CaptureError(
                f"the forward of {type(model).__name__} computes otherwise by size: as with these examples it is right "
                f"from {low}{most} of {symbol} alone. Write it without a branch on the size of an input, or leave "
                "that dim out of dynamic="
            )


def _other_sizes(
    forward: nn.Module, program: Any, inputs: Mapping[str, torch.Tensor], dynamic: Dynamic
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Inputs in which the sizes of one dynamic dim, and all that equal it, are larger, and what the model makes.

    Args:
        forward: the model's.
        program: of torch.export, whose inputs say which sizes are one.
        inputs: the examples.
        dynamic: dims that may have other sizes.

    Raises:
        CaptureError: the model cannot be called with a size.
    """
    shapes = {
        node.name: node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and "val" in node.meta
    }
    names = dict(zip(inputs, program.graph_signature.user_inputs, strict=True))
    free = {(n, d): str(shapes[names[n]][d]) for n, dims in dynamic.items() for d in dims}
    alike = {(n, d): (d, inputs[n].shape[d]) for n, d in free}  # rows, or lengths: no guard may say that they are one
    for symbol in dict.fromkeys(free.values()):
        given, kinds = dict(inputs), {alike[key] for key, size in free.items() if size == symbol}
        for (name, dim), size in free.items():
            if size == symbol or alike[name, dim] in kinds:
                one = given[name]
                given[name] = torch.cat((one, one.narrow(dim, 0, 1)), dim)
        try:
            yield given, forward(**given)
        except (TypeError, IndexError, ValueError, RuntimeError) as error:
            raise CaptureError(
                f"the model cannot be called where a dim of dynamic= has another size ({error}); leave out of "
                f"dynamic= {', '.join(f'dim {dim} of {name}' for (name, dim), size in free.items() if size == symbol)}"
            ) from error


def _write_onnx(program: Any, path: Path, outputs: list[str]) -> None:
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    try:
        with _quiet():
            torch.onnx.export(
                program,
                (),
                path,
                dynamo=True,
                output_names=outputs,
                external_data=num_bytes > MAX_INLINE_BYTES,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise CaptureError(f"ONNX has no op for a part of the forward: {error}; write a .pt2, or rewrite it") from error


def _by_onnxruntime(path: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of a file by onnxruntime, on processors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(ACCURACY, "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        takes = {found.name for found in session.get_inputs()}
        given = {name: tensor.cpu().numpy() for name, tensor in inputs.items() if name in takes}
        names = [found.name for found in session.get_outputs()]
        made = session.run(names, given)
    except Exception as error:  # its own kinds have no public base
        raise CaptureError(
            f"onnxruntime cannot run the file: {error}; write a .pt2, or rewrite what it names"
        ) from error
    return {n: torch.from_numpy(array) for n, array in zip(names, made, strict=True)}


def _check(what: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Refuse numbers that are not the model's. Raises InferenceError."""
    for name, tensor in wanted.items():
        own, other = tensor.cpu().double(), found[name].cpu().double()
        error = float((own - other).abs().max()) if own.shape == other.shape and own.numel() else 0.0
        limit = TOLERANCE * float(own.abs().max()) if own.numel() else 0.0
        if own.shape != other.shape or not error <= limit:
            raise InferenceError(
                f"{what} gives {name} of shape {tuple(other.shape)}, {error:.3g} away from the model's own of shape "
                f"{tuple(own.shape)}; look for what its forward draws or keeps between calls, and pass examples "
                "without padding, whose numbers mean nothing"
            )


def _check_inputs(inputs: Mapping[str, torch.Tensor], dynamic: Dynamic) -> None:
    if not inputs or any(not isinstance(value, torch.Tensor) for value in inputs.values()):
        raise UsageError("inputs are tensors, examples of the forward's arguments by name")
    for name, dims in dynamic.items():
        if name not in inputs:
            raise UsageError(f"dynamic has {name!r}, and inputs have {', '.join(inputs)}; name one of these")
        shape = inputs[name].shape
        if wrong := [dim for dim in dims if not 0 <= dim < len(shape) or shape[dim] < 2]:
            raise UsageError(
                f"dim {wrong[0]} of {name}, of shape {tuple(shape)}, cannot be of any size: name one that is there, "
                "and pass an example of size 2 or more"
            )


def _check_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ONNX needs {error.name}: pip install zgraph-compiler[export]") from None


def _whole(model: nn.Module) -> nn.Module | None:
    """A plain copy of a compiled model with all of its weights, on the first rank. All ranks meet in it."""
    compiled = compiled_model(model)
    session, is_first = compiled.session, compiled.session.store.rank == 0
    session.begin_call()
    if not session.is_alone:
        session.peers.agree("an export: export_model is for all ranks to call", "")
    assert compiled.plain is not None, "the model is attached"
    plain = compiled.plain() if is_first else None
    parameters = dict(plain.named_parameters()) if plain is not None else {}
    try:
        with torch.no_grad():
            for slot in session.store.slots.values():
                whole = full(session, slot)
                if is_first:
                    parameters[slot.name].copy_(whole)
    except BaseException as error:
        session.fail(error)
        raise
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words on packages that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
