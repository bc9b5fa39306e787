"""Models that `MODEL` names on the command line: a Hugging Face configuration, or a function in a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

import torch
from torch import nn

from zgraph.errors import UsageError, did_you_mean
from zgraph.ir.names import known_namespaces
from zgraph.passes import Pass


@dataclass(frozen=True)
class Subject:
    """A model on the meta device, with what to call it with.

    `has_own_inputs` says that these are its function's, whatever batch and length were asked for.
    """

    model: nn.Module
    inputs: dict[str, Any]
    has_own_inputs: bool = False


BATCH, SEQ = 1, 2048
"""Rows, and tokens of each, where nothing is said."""


def subject(name: str, batch: int | None = None, seq: int | None = None) -> Subject:
    """The model of a name.

    Args:
        name: `file.py:function`, whose function returns a module, or a module and a dict of inputs; or what
            transformers' AutoConfig takes: a folder, a `config.json`, the name of a model in its cache.
        batch: rows of the inputs; None takes one.
        seq: tokens of each; None takes 2048.

    Raises:
        UsageError: there is no such model, what makes it fails, its forward does not take the inputs, or they are its
            own and others are asked for.
    """
    if name.endswith(".py"):
        raise UsageError(f"say which function of {name} makes the model: {name}:FUNCTION")
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        found = _of_file(Path(path), function, batch, seq)
    else:
        found = _of_config(name, batch, seq)
    _check_call(found, name)
    return found


def _check_call(found: Subject, name: str) -> None:
    """Raise UsageError if the forward cannot be called with the inputs."""
    signature = inspect.signature(found.model.forward)
    try:
        signature.bind(**found.inputs)
    except TypeError as error:
        kind = type(found.model).__name__
        given = ", ".join(found.inputs) or "nothing"
        whose = "the function's inputs are" if found.has_own_inputs else "a language model is called with"
        raise UsageError(
            f"{name}: {kind}.forward{_arguments(signature)} does not take what it is called with: {error}; {whose} "
            f"{given}. Have the function return (model, inputs), with a dict of inputs by the names of its arguments."
        ) from None


def _arguments(signature: inspect.Signature) -> str:
    """The names of arguments, without their types."""
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))


def passes_of(name: str) -> dict[str, type[Pass]]:
    """The passes that a Python file defines, by their names; none where all it does is to allow namespaces of ops.

    Raises:
        UsageError: there is no such file, it cannot be imported, or it defines none.
    """
    namespaces = known_namespaces()
    module = _imported(Path(name))
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, Pass)]
    found = {k.name: k for k in kinds if k.__module__ == module.__name__ and isinstance(getattr(k, "name", None), str)}
    if not found and known_namespaces() == namespaces:
        raise UsageError(f"{name} defines no pass: a frozen dataclass that is a zgraph.passes.Pass and has a name")
    return found


def _imported(path: Path) -> ModuleType:
    """A Python file as a module, which may import what lies beside it."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(f"zgraph_file_{path.stem}", path)
    if found is None or found.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where torch.compile looks up globals, and dataclasses their annotations
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found.loader.exec_module(module)
    except Exception as error:  # the user's, whatever it is
        raise UsageError(f"{path} cannot be imported: {_told(error, path)}") from error
    return module


def _told(error: Exception, path: Path) -> str:
    """Text of an error that the code of a file raised, with the last of its lines that led there."""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    return f"{type(error).__name__}: {error}" + (f" ({path}:{lines[-1]})" if lines else "")


def _of_file(path: Path, function: str, batch: int | None, seq: int | None) -> Subject:
    module = _imported(path)
    if not callable(make := getattr(module, function, None)):
        own = [n for n, found in vars(module).items() if getattr(found, "__module__", "") == module.__name__]
        hint = did_you_mean(function, own, f"it has {', '.join(own) or 'none'}")
        raise UsageError(f"{path} has no function {function}; {hint}")
    try:
        with torch.device("meta"):
            made = make()
    except Exception as error:  # the user's, whatever it is
        raise UsageError(f"{path}:{function} raised {_told(error, path)}") from error
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path}:{function} returned a {type(model).__name__}, not a module")
    if not isinstance(inputs, dict | None):
        raise UsageError(f"{path}:{function} returned a {type(inputs).__name__} of inputs, not a dict by their names")
    if inputs is not None:
        if asked := " and ".join(o for o, n in (("--batch", batch), ("--seq", seq)) if n is not None):
            raise UsageError(
                f"{path}:{function} gives its own inputs, so that {asked} would change nothing: leave it out, or have "
                "the function return the model alone"
            )
        return Subject(model, inputs, has_own_inputs=True)
    return Subject(model, training_inputs(model, batch, seq))


def _of_config(name: str, batch: int | None, seq: int | None) -> Subject:
    try:
        import transformers
    except ImportError:
        raise UsageError(
            f"{name} is no FILE.py:FUNCTION, and Hugging Face names need transformers: pip install transformers"
        ) from None
    path = Path(name)
    if path.name == "config.json" and not path.exists():
        raise UsageError(f"there is no file {path}. Give a folder with a config.json, or FILE.py:FUNCTION.")
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"transformers knows no model {name}: {reason} Give a folder with a config.json.") from None
    kinds = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    kind = next((k for k in kinds if k is not None), None)
    config.use_cache = False
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        model = kind(config) if kind is not None else auto.from_config(config)
    return Subject(model, training_inputs(model, batch, seq))


def training_inputs(model: nn.Module, batch: int | None = None, seq: int | None = None) -> dict[str, Any]:
    """Inputs of a training step: tokens for a language model, images for one that has `image_size`."""
    config = getattr(model, "config", None)
    batch, seq = BATCH if batch is None else batch, SEQ if seq is None else seq
    if config is None:
        raise UsageError(
            f"what to call {type(model).__name__} with is not known: have the function return (model, inputs)"
        )
    if getattr(config, "vocab_size", None) is None and getattr(config, "image_size", None) is not None:
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        labels = torch.zeros(batch, dtype=torch.int64, device="meta")
        return {"pixel_values": torch.empty(batch, channels, size, size, device="meta"), "labels": labels}
    ids = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids}
