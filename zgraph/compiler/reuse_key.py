"""Keys of kept plans: lines of text that say all that a plan depends on. Two of the same lines are of one plan."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from zgraph.bridge.private_rehearsal import global_state, is_marked
from zgraph.capture.functions_run import code_digest
from zgraph.environment import environment
from zgraph.options.settings import Settings
from zgraph.passes import Context, Pipeline
from zgraph.runtime import ShardStore
from zgraph.runtime.agreement import settings_lines
from zgraph.version import __version__

FORMAT = 1

_NUMBERS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NoKey(RuntimeError):
    """Something that a plan depends on has no text. The message says what."""


def signature_of(leaves: Sequence[Any], spec: Any, *, training: bool) -> tuple[Any, ...]:
    """All of a call that a captured graph is made for, but for what the rehearsal finds: equal only for like calls.

    Args:
        leaves: of the arguments, flat.
        spec: how they are nested.
        training: whether the model is in training.

    Raises:
        NoKey: an argument is of a kind that has no text, or has sizes that are marked as ones that change.
    """
    first: dict[int, int] = {}
    words = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            words.append((*_tensor(leaf), first.setdefault(id(leaf), index)))
        elif isinstance(leaf, _NUMBERS):
            words.append((type(leaf), leaf))
        else:
            raise NoKey(f"an argument is a {type(leaf).__name__}")
    state = global_state(sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor))}))
    if state == ("modes",):
        raise NoKey("a mode of torch sees every op of the call")
    return spec, tuple(words), state, training


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise NoKey(f"an argument is a {type(tensor).__name__} of layout {tensor.layout}")
    if tensor.is_conj() or tensor.is_neg() or is_marked(tensor):
        raise NoKey("an argument's sizes are marked as ones that change, or it is a conjugate")
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device, tensor.requires_grad


def lines_of(
    model: nn.Module,
    described: str,
    settings: Settings,
    store: ShardStore,
    pipeline: Pipeline,
    context: Context,
    signature: tuple[Any, ...],
    rehearsed: str,
) -> str:
    """The key of one kind of call of a model.

    Args:
        model: the model.
        described: names, shapes, dtypes and stages of its parameters and buffers.
        settings: the options of `zgraph.compile`.
        store: the parameters at rest.
        pipeline: the passes.
        context: of the passes.
        signature: of the call.
        rehearsed: text of its rehearsal.

    Raises:
        NoKey: a pass has no source to tell it by.
    """
    spec, words, state, training, trained = signature
    lines = [f"kept plan {FORMAT}", *_versions(model), *_hardware(settings.device)]
    lines += [*settings_lines(str(pipeline)), *_passes(pipeline), *_options(settings)]
    lines += [f"context {TypeAdapter(Context).dump_json(context).decode()}", described, *_modules(model, store)]
    lines += [f"call {spec}", *map(str, words), f"state {state}", f"training {training}, {trained}", rehearsed]
    return "\n".join(lines)


def _versions(model: nn.Module) -> Iterator[str]:
    yield f"zgraph {__version__} {sources_digest()}"
    yield f"torch {torch.__version__} {torch.version.git_version}"
    yield f"python {platform.python_implementation()} {platform.python_version()}"
    packages = {kind.__module__.partition(".")[0] for module in model.modules() for kind in [type(module)]}
    for package in sorted({*packages, "transformers"} - {"torch"}):
        if version := getattr(sys.modules.get(package), "__version__", ""):
            yield f"{package} {version}"


@cache
def sources_digest() -> str:
    """A hash of zgraph's own source, which may change while its version does not."""
    made, root = hashlib.sha256(), Path(__file__).parents[1]
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith((".py", ".json")):
                path = Path(folder, name)
                made.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return made.hexdigest()


def _hardware(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield f"device {properties.name}, compute capability {properties.major}.{properties.minor}"
    else:
        yield f"device {device.type} {platform.machine()}"


def _passes(pipeline: Pipeline) -> Iterator[str]:
    """The source of passes that are not zgraph's."""
    for step in pipeline.passes:
        kind = type(step)
        if kind.__module__.partition(".")[0] == "zgraph":
            continue
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        try:
            yield f"pass {step.name} {hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()}"
        except OSError:
            raise NoKey(f"the pass {step.name} has no source to tell it by") from None


def _options(settings: Settings) -> Iterator[str]:
    for name in ("kernels", "cuda_graphs", "regions", "fullgraph", "dynamic", "param_dtype", "reduce_dtype"):
        yield f"{name} {getattr(settings, name)}"
    yield f"ZGRAPH_VERIFY={environment().verify}"


def _modules(model: nn.Module, store: ShardStore) -> Iterator[str]:
    """Lines of modules, with what their classes do, and of what each parameter is: tied, trained, on the host."""
    for name, module in model.named_modules():
        kind: Any = type(module)
        yield f"{name}: {kind.__module__}.{kind.__qualname__} {_code(kind)} training {module.training}"
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"{name} is {first[id(parameter)]}, trained {parameter.requires_grad}, strides {parameter.stride()}"
    for slot in store.slots.values():
        yield f"{slot.name}: offload {slot.offload}"
    config: Any = getattr(model, "config", None)
    if callable(text := getattr(config, "to_json_string", None)):
        yield f"config {text()}"


@cache
def _code(kind: type[nn.Module]) -> str:
    """A hash of the methods of a class and of those that it is made of, but for torch's."""
    found = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            methods = ((name, getattr(f, "__code__", None)) for name, f in vars(base).items())
            found += [f"{base.__qualname__}.{name} {code_digest(code)}" for name, code in methods if code is not None]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
