"""Higher-order ops, which call functions, as the IR has them. A private corner of torch, tried on torch 2.13.0.

A function returns a tuple. Results are flat, each in new memory. Autograd and autocast have been at work before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo._trace_wrapped_higher_order_op
import torch._higher_order_ops
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

__all__ = ["CALLS", "WITHOUT_DATA", "HigherOrderOperator", "wanted_gradients"]

Function = Callable[..., Any]

_DONE = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _call(name: str, *args: Any) -> list[Any]:
    """Results of an op; those that would share memory with what it reads, or with others, as copies."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_DONE):
        results = pytree.tree_leaves(getattr(torch.ops.higher_order, name)(*args), is_leaf=lambda x: x is None)
        taken = {_memory(t) for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        for index, made in enumerate(results):
            if isinstance(made, torch.Tensor):
                if _memory(made) in taken:
                    results[index] = made = made.clone()
                taken.add(_memory(made))
    return results


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _first(function: Function) -> Function:
    return lambda *inputs: function(*inputs)[0]


def _listing(function: Function) -> Function:
    return lambda *inputs: list(function(*inputs))


def _cond(pred: Any, true: Function, false: Function, operands: Sequence[Any] = ()) -> list[Any]:
    return _call("cond", pred, true, false, tuple(operands))


def _while_loop(condition: Function, body: Function, carried: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return _call("while_loop", _first(condition), body, tuple(carried), tuple(others))


def _while_loop_stack(condition: Function, body: Function, carried: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return _call("while_loop_stack_output", _first(condition), body, tuple(carried), tuple(others))


def _scan(combine: Function, init: Sequence[Any], xs: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return _call("scan", combine, list(init), list(xs), tuple(others))


def _associative_scan(combine: Function, xs: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return _call("associative_scan", combine, list(xs), tuple(others))


def _map(function: Function, xs: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return _call("map_impl", function, list(xs), tuple(others))


def _flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: Function,
    mask: Sequence[Any],
    scale: float,
    options: Sequence[Sequence[Any]],
    score_reads: Sequence[Any] = (),
    mask_reads: Sequence[Any] = (),
) -> list[Any]:
    rest = (_blocks(mask), scale, dict(map(tuple, options)), tuple(score_reads), tuple(mask_reads))
    return _call("flex_attention", query, key, value, _first(score), *rest)


def _flex_attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_made: torch.Tensor | None,
    grad_logsumexp: torch.Tensor | None,
    score: Function,
    joint: Function,
    mask: Sequence[Any],
    scale: float,
    options: Sequence[Sequence[Any]],
    score_reads: Sequence[Any],
    mask_reads: Sequence[Any],
    wanted: Sequence[bool],
) -> list[Any]:
    """`wanted` says of what the score's function reads a gradient is wanted: torch sees that by requires_grad."""
    reads = tuple(r.detach().requires_grad_() if w else r for r, w in zip(score_reads, wanted, strict=True))
    given = (query, key, value, made, logsumexp, grad_made, grad_logsumexp, _first(score), _listing(joint))
    rest = (_blocks(mask), scale, dict(map(tuple, options)), reads, tuple(mask_reads))
    found = _call("flex_attention_backward", *given, *rest)
    return [*found[:3], *(g if w else None for g, w in zip(found[3:], wanted, strict=True))]


def _blocks(mask: Sequence[Any]) -> tuple[Any, ...]:
    return (*mask[:-1], _first(mask[-1]))


def wanted_gradients(target: Any, results: Any) -> tuple[Any, ...]:
    """Argument that `flex_attention_backward` has here and not in torch, from the results of a call; else nothing."""
    if target is not torch.ops.higher_order.flex_attention_backward:
        return ()
    return (tuple(isinstance(found, torch.Tensor) for found in results[3]),)


def _one_turn(
    condition: Function, body: Function, carried: Sequence[Any], others: Sequence[Any]
) -> Sequence[torch.Tensor]:
    condition(*carried, *others)
    return body(*carried, *others)  # type: ignore[no-any-return]


def _one_turn_stack(*args: Any) -> list[torch.Tensor]:
    return [made[None] for made in _one_turn(*args)]


CALLS: Mapping[str, Callable[..., list[Any]]] = {
    "associative_scan": _associative_scan,
    "cond": _cond,
    "flex_attention": _flex_attention,
    "flex_attention_backward": _flex_attention_backward,
    "map_impl": _map,
    "scan": _scan,
    "while_loop": _while_loop,
    "while_loop_stack_output": _while_loop_stack,
}
"""The ops of `zgraph.ir.names.HIGHER_ORDER_OPS`, by their names there."""

WITHOUT_DATA = {**CALLS, "while_loop": _one_turn, "while_loop_stack_output": _one_turn_stack}
"""The same on tensors without data: a loop makes one turn, since nobody knows how many there would be."""
