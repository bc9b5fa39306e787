"""Rehearsals: a call of a model on tensors without data, which says what the call computes and what that depends on.

It takes a fraction of what a capture takes, and it is no capture: it has no graph. Two calls with equal rehearsals
compute the same, so that what one was compiled to can run in the place of the other. A rehearsal has

    terms       of the tensors that are returned, and of the memory that is written to
    template    of the objects that are returned
    state       the Python values that the functions which ran may read, to notice when one changes
    functions   a hash of these functions

What Python does beside, each time it is called, would be left out by whoever runs a plan in its place: a forward that
changes what it can read the next time, that prints or that changes its arguments has no rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.bridge.private_fake import FakeTensor
from zgraph.bridge.private_rehearsal import NoTerm, Terms, on_tensors_without_data, storage_of
from zgraph.capture.functions_run import Functions, Unseen
from zgraph.capture.python_state import PythonState
from zgraph.capture.template import NoTemplate, Template
from zgraph.errors import in_one_line

PARAM, BUFFER, INPUT = "param", "buffer", "input"


class NoRehearsal(RuntimeError):
    """A call cannot be told from others by a rehearsal. The message says why."""


@dataclass(frozen=True)
class Result:
    """A tensor that a call returns: its term, dtype and shape, or which input it is."""

    term: str
    requires_grad: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    input: int | None


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal of one call: see above.

    Args:
        results: of the template's tensors.
        written: the terms of buffers and inputs that are written to, by name.
        template: what is returned.
        state: what the call may depend on.
        text: lines that say all that the call computes, and by which functions.
    """

    results: tuple[Result, ...]
    written: Mapping[str, str]
    template: Template
    state: PythonState
    text: str


def rehearse(model: nn.Module, forward: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> Rehearsal:
    """The rehearsal of a call.

    Args:
        model: the model, whose parameters need have no data.
        forward: is called.
        leaves: of the arguments and the keyword arguments, flat.
        spec: how they are nested.

    Raises:
        NoRehearsal: there is none.
    """
    state = PythonState()
    functions = Functions(state)
    for name, module in model.named_modules():
        state.note(module, name or "the model")
    for kind in {type(module) for module in model.modules()}:
        state.note_class(kind)
    if any(module._backward_hooks or module._backward_pre_hooks for module in model.modules()):
        raise NoRehearsal("a module has a hook for its backward")
    if state.problem:
        raise NoRehearsal(state.problem)
    terms = Terms(names_of(model, leaves))
    given = [terms.fake(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(given, spec)
    try:
        with on_tensors_without_data(terms, functions.seen):
            found = forward(*args, **kwargs)
        _check_arguments(args, kwargs, given, spec)
        if place := state.changed():
            raise NoRehearsal(f"it changes {place}")
        template = Template(found, state.holds)
        results = _results(template, terms, given)
    except NoRehearsal:
        raise
    except Unseen as error:
        raise NoRehearsal(str(error)) from None
    except NoTemplate as error:
        raise NoRehearsal(f"{error}, which only the model itself can make") from None
    except NoTerm as error:
        raise NoRehearsal(str(error)) from None
    except Exception as error:
        raise NoRehearsal(f"it does not run on tensors without data ({in_one_line(error)})") from None
    finally:
        state.restore()
    written = terms.written
    if not {name.partition(" ")[0] for name in written} <= {BUFFER}:
        raise NoRehearsal(f"it writes to {next(n for n in written if not n.startswith(BUFFER))}")
    functions.note_closures()
    state.finish(functions.names)
    if state.problem:
        raise NoRehearsal(state.problem)
    lines = [f"functions {functions.digest}", f"checkpoints {terms.regions}", *template.text.splitlines()]
    lines += [f"tensor {r.term} {r.requires_grad} {r.input}" for r in results]
    lines += [f"{name} becomes {term}" for name, term in sorted(written.items())]
    return Rehearsal(results, written, template, state, "\n".join(lines))


def names_of(model: nn.Module, leaves: Sequence[Any]) -> dict[int, str]:
    """The names of the tensors that a call may read, by `id`."""
    names = {id(leaf): f"{INPUT} {i}" for i, leaf in reversed([*enumerate(leaves)]) if isinstance(leaf, torch.Tensor)}
    names |= {id(b): f"{BUFFER} {name}" for name, b in model.named_buffers()}
    return names | {id(p): f"{PARAM} {name}" for name, p in model.named_parameters()}


def _check_arguments(args: Any, kwargs: Any, given: Sequence[Any], spec: Any) -> None:
    after, structure = pytree.tree_flatten((args, kwargs))
    if structure != spec or any(a is not b for a, b in zip(after, given, strict=True)):
        raise NoRehearsal("it changes its arguments")


def _results(template: Template, terms: Terms, given: Sequence[Any]) -> tuple[Result, ...]:
    """Tensors of the result. A view of memory that others see has no place among them."""
    known = {id(leaf): index for index, leaf in reversed([*enumerate(given)]) if isinstance(leaf, torch.Tensor)}
    shared = terms.known_storages
    found = []
    for tensor in template.tensors:
        index = known.get(id(tensor))
        if index is None and not isinstance(tensor, FakeTensor):
            raise NoRehearsal("it returns a parameter, a buffer or a constant")
        if index is None and storage_of(tensor) in shared:
            raise NoRehearsal("it returns tensors that share memory with each other, a parameter, a buffer or an input")
        shared.add(storage_of(tensor))
        found.append(Result(terms.term(tensor), tensor.requires_grad, tensor.dtype, tuple(tensor.shape), index))
    template.tensors.clear()  # they hold what autograd has of the rehearsal
    return tuple(found)


@dataclass(frozen=True)
class Traced:
    """Outputs of a graph of torch.compile's: of each its term, whether it requires a gradient, its dtype and
    shape; and the terms of what is written to.
    """

    terms: Sequence[str]
    requires_grad: Sequence[bool]
    kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]
    written: Mapping[str, str]


def trace(graph: Callable[..., Any], examples: Sequence[Any], names: Mapping[int, str]) -> Traced:
    """Trace a graph on tensors without data.

    Args:
        graph: what torch.compile has traced.
        examples: its arguments.
        names: of the arguments, by `id`.

    Raises:
        NoTerm: it returns or reads what has none; or what the graph raises on tensors without data.
    """
    terms = Terms(names)
    given = [terms.fake(example) if isinstance(example, torch.Tensor) else example for example in examples]
    with on_tensors_without_data(terms):
        found = pytree.tree_leaves(graph(*given))
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        raise NoTerm("it returns what is no tensor")
    kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in found]
    return Traced([terms.term(t) for t in found], [t.requires_grad for t in found], kinds, terms.written)
