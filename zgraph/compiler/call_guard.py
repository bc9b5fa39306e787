"""Guard around each call of a compiled model: placeholders in place, peers told of failures, misuse caught."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zgraph.bridge.private_compile import compiled_backward_node
from zgraph.bridge.private_pause import pause_capture, resume_capture
from zgraph.bridge.private_runtime import keeps_graph
from zgraph.errors import BackwardTwiceError, EscapedParameterError, StaleParametersError, UsageError
from zgraph.runtime import Session
from zgraph.runtime.structure import Structure
from zgraph.runtime.unused import absent_tangents


def guard(
    forward: Callable[..., Any],
    session: Session,
    param_dtype: torch.dtype | None,
    like: Callable[..., Any],
    forget: Callable[[], None] | None,
    structure: Structure,
) -> Callable[..., Any]:
    """The model's new `forward`: placeholders in place for its length, peers told of failures, misuse caught.

    Args:
        forward: runs with placeholders in place.
        like: the model's own forward, whose signature is the new one's: transformers reads from it what a model takes.
        forget: has the model captured anew at this call, since its hooks are others than before; None if nothing is
            captured.
        structure: of the model as it was sharded.
    """
    placeholders = {id(s.placeholder): s.name for s in session.store.slots.values() if s.placeholder is not s.parameter}

    def zgraph_forward(*args: Any, **kwargs: Any) -> Any:
        paused = pause_capture()
        try:
            session.begin_call()
            check_moved(session)
            structure.check()
            if forget is not None and structure.has_new_hooks():
                forget()
            if param_dtype is not None:
                args, kwargs = _cast((args, kwargs), param_dtype)
            with session.store.placeholders():
                result = forward(*args, **kwargs)
            _watch_outputs(result, placeholders, session)
        except BaseException as error:
            session.fail(error)
            raise
        finally:
            resume_capture(paused)
        return result

    zgraph_forward.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return zgraph_forward


def eager(forward: Callable[..., Any], param_dtype: torch.dtype | None) -> Callable[..., Any]:
    """The model's own forward, on inputs of the dtype to compute in."""
    if param_dtype is None:
        return forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _cast((args, kwargs), param_dtype)
        return forward(*args, **kwargs)

    cast.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return cast


def check_moved(session: Session) -> None:
    """Raise UsageError if the memory of a parameter is no longer the session's."""
    if session.store.is_lent:
        raise UsageError(
            "the model is called within GatheredParameters: call it outside, or with zgraph.gathered(model) in the "
            "place of GatheredParameters"
        )
    if moved := session.store.moved():
        raise UsageError(
            f"the memory of {moved} was replaced after zgraph.compile (by model.to(), .half(), `p.data = ...` or "
            "vector_to_parameters?); move or convert the model before it is compiled, and copy new values in with "
            "`with torch.no_grad(): parameter.copy_(...)`"
        )


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _watch_outputs(result: Any, placeholders: Mapping[int, str], session: Session) -> None:
    """Catch a parameter that escapes, and a backward that comes too often or too late."""
    watched: set[Any] = set()
    for leaf in _tensors(result, depth=3):
        if name := placeholders.get(id(leaf)):
            raise EscapedParameterError(
                f"the forward returned the parameter {name}, whose gathered memory is gone after the call; return a "
                "clone of it"
            )
        node = compiled_backward_node(leaf) if leaf.requires_grad else None
        if session.adds_nothing and leaf.requires_grad:
            leaf.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
        if node is not None and node not in watched:
            watched.add(node)
            node.register_prehook(_before_backward(weakref.ref(node), session))


def _tensors(result: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors of what a model returns, in objects as well."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, type | torch.nn.Module):
            yield from _tensors(list(vars(leaf).values()), depth - 1)


def _before_backward(node: weakref.ref[Any], session: Session) -> Callable[[Any], None]:
    """Hook for the beginning of one call's backward: checks, and the choice of the backward of the loss only.

    If only the loss is differentiated, and the plan has a backward for that, autograd need not make zeros for the other
    outputs. Where some parameters are behind some outputs alone, the session learns which outputs have no gradient.
    """
    store = session.store
    spent, version, loss_only, tangents = False, store.version, session.loss_only_call, session.tangents

    def check(gradients: tuple[torch.Tensor | None, ...]) -> None:
        nonlocal spent
        if torch.is_grad_enabled():
            raise UsageError(
                "create_graph=True asks for a backward that can be differentiated; that of a captured graph cannot: "
                'pass fullgraph="eager" to zgraph.compile for gradient penalties and other second derivatives'
            )
        if spent:
            raise BackwardTwiceError(
                "this is the second backward through the same forward, whose saved values the first one freed; call "
                "the first with retain_graph=True, or run the forward again"
            )
        if store.version != version:
            raise StaleParametersError(
                "parameters were changed (by optimizer.step() or load_state_dict?) between this forward and its "
                "backward, which would compute with the new ones; run the backward first, or the forward again"
            )
        spent = not keeps_graph()
        present = [g for g in gradients if g is not None]
        if (context := node()) is not None:
            context.materialize_grads = not (loss_only and len(present) == 1 and present[0].dim() == 0)
            session.absent = absent_tangents(tangents, context._input_metadata, gradients) if tangents else frozenset()

    return check
