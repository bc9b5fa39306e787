"""Generation inside of a training loop: shards brought into the layout of inference once, and given back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import UsageError
from zgraph.inference.generation import Generator
from zgraph.inference.model import infer
from zgraph.runtime.eager_fallback import full
from zgraph.runtime.session import Session


class _Served:
    """A plain copy of a compiled model, whose memory is there while it serves.

    Args:
        session: of the compiled model.
        plain: the copy, with whole parameters that hold no values.
        part: the name of the module in it that generates; empty for all of it.
        options: of `zgraph.infer`.

    Raises:
        UsageError: the part has a parameter that the session has not.
    """

    def __init__(self, session: Session, plain: nn.Module, part: str, options: dict[str, Any]) -> None:
        self.session, self.part, self.options = session, part, options
        everywhere = dict(plain.named_parameters(remove_duplicate=False))
        plain = self.plain = plain.get_submodule(part)
        parameters = dict(plain.named_parameters())
        by_id = {id(parameter): name for name, parameter in parameters.items()}
        self.names = {
            slot: by_id[id(parameter)]
            for slot in session.store.slots
            if (parameter := everywhere.get(slot)) is not None and id(parameter) in by_id
        }
        if lost := parameters.keys() - self.names.values():
            raise UsageError(
                f"{', '.join(sorted(lost)[:5])} of part={part!r} is no parameter that was compiled: leave part= out, "
                "or compile the model after it has all of its parameters"
            )
        with torch.no_grad():
            for name, whole in self._wholes():
                parameters[name].copy_(whole)
        found = infer(plain, **options)
        if not isinstance(found, Generator):
            found.generate()
        self.generator: Generator = found
        self.is_open = True

    def fill(self, model: nn.Module) -> None:
        """Bring all parameters into the layout of inference, one after the other, and buffers as they are now."""
        self.is_open = True
        self.generator.calls.arena.resize(is_there=True)
        own = dict(self.plain.named_buffers())
        with torch.no_grad():
            for name, buffer in model.get_submodule(self.part).named_buffers():
                if name in own:
                    own[name].copy_(buffer)
        self.generator.programs.load(self._wholes())

    def free(self) -> None:
        """Give the memory back."""
        self.is_open = False
        self.generator.programs.unload()
        self.generator.calls.arena.resize(is_there=False)

    def _wholes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter of the part, gathered from its shards. All ranks meet in it."""
        self.session.begin_call()
        try:
            for name, slot in self.session.store.slots.items():
                if name in self.names:
                    yield self.names[name], full(self.session, slot)
        except BaseException as error:
            self.session.fail(error)
            raise


def _same(one: object, other: object) -> bool:
    """Whether options are the same, with tensors among them."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor) and bool(one == other)


_SERVED: weakref.WeakKeyDictionary[nn.Module, _Served] = weakref.WeakKeyDictionary()
"""The copy that each compiled model generates with: its programs are captured once."""


@contextmanager
def serving(model: nn.Module, *, part: str = "", **options: Any) -> Iterator[Generator]:
    """Generate with a model that is compiled for training, within a training loop.

        with zgraph.serving(model, max_batch=8, max_len=256) as inference:
            tokens = inference.generate(ids, max_new_tokens=64)

    Each parameter is gathered from its shards once at the beginning, into the layout of inference; for a token nothing
    is. At the end, that memory is given back. Programs are captured at the first `with` of a model alone. All ranks
    enter it together. Within it they may generate from other prompts, unless they compute together.

    Args:
        model: a causal language model of transformers, compiled by `zgraph.compile` at any stage.
        part: the name of the module in it that generates, "student" of what `zgraph.distill` gives; empty for the model
            itself.
        options: those of `zgraph.infer`: `max_batch`, `max_len`, `weights`, `tensor_parallel` and so on, the same each
            time. With `tensor_parallel` each rank keeps its part alone; the first time it holds the whole, which the
            step is compared with.

    Raises:
        UsageError: the model is not compiled, has no such part, cannot generate, or serves already; the options
            are not those of the last time; or what this gave is used outside.
        PeerError: another rank failed.
    """
    compiled = compiled_model(model)
    if part not in dict(model.named_modules()):
        raise UsageError(f"this {type(model).__name__} has no module {part!r}; name one of model.named_modules()")
    if options.get("calibrate") is not None and options.get("weights") == "int4":
        raise UsageError('weights="int4" is rounded anew each time; leave calibrate= out within training')
    if options.get("tensor_parallel") not in (None, 1) and options.get("weights") is not None:
        raise UsageError(
            "integers of which ranks have parts are made once; within training leave weights= or tensor_parallel= out"
        )
    held = _SERVED.get(model)
    if held is not None and not (held.part == part and _same(held.options, options)):
        raise UsageError(
            f"this {type(model).__name__} was served with {held.options or 'no options'}, part={held.part!r}, and "
            "programs are captured once; pass the same options each time"
        )
    if held is not None and held.is_open:
        raise UsageError(f"this {type(model).__name__} serves already: use what the `with` around this one gave")
    is_new = held is None
    if held is None:
        assert compiled.plain is not None, "the model is attached"
        held = _SERVED[model] = _Served(compiled.session, compiled.plain(), part, options)
    try:
        if not is_new:
            held.fill(model)
        yield held.generator
    finally:
        held.free()
