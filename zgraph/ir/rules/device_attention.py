"""Rules of fused attention on GPUs: batch and heads pass, as in `attention`, and rows of queries do not.

What their kernels say of rows beside the output (logarithms of sums, padded to the kernel's tiles; lengths; what they
would draw from) is read by their backwards alone. With dropout all is whole: a rank would draw other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zgraph.ir.graph import Value
from zgraph.ir.rules.attention import groups, mask
from zgraph.ir.rules.factors import Call, Rule, Shape, letters, written

__all__ = ["RULES"]

HEADS = {"q": "b (h g) _q _d", "k": "b h _s _d", "v": "b h _s _e", "o": "b (h g) _q _e"}
"""Factors of queries, keys, values, and of what attention makes."""

_FORWARD = {"flash": "qkv", "efficient": "qkvm", "cudnn": "qkvm"}

_BACKWARD = {"flash": "oqkvol", "efficient": "oqkvmol", "cudnn": "oqkvol  m"}
"""Arguments of each op: of the letters above, a mask, or logarithms of sums; others are read whole."""

_DROPOUTS = {"flash": (3, 10), "efficient": (5, 9), "cudnn": (5, 13)}
"""Where the probability of dropout is among the arguments of an op and of its backward."""


def _rule(call: Call, roles: str, results: str, dropout: int) -> Rule | None:
    """The rule of a call whose arguments and results are these; None with dropout, or a gradient of the mask."""
    known = _operands(call, roles)
    at = {role: number for number, role in known.items()}
    sizes = groups(call, at["q"], at["k"])
    if call.arg(dropout, "dropout_p", 0.0) or sizes is None:
        return None
    if any(shape is not None for shape in call.outs[len(results) :]) and results == "qkv":
        return None
    ins = [_text(known.get(n, " "), shape, f"in{n}_") for n, shape in enumerate(call.ins) if shape is not None]
    outs = [
        _text(results[n] if n < len(results) else " ", shape, f"out{n}_")
        for n, shape in enumerate(call.outs)
        if shape is not None
    ]
    same = tuple(range(len(results), len(call.outs)))  # what a kernel says beside
    return written(call, f"{', '.join(ins)} -> {', '.join(outs)}", sizes=sizes, same=same)


def _operands(call: Call, roles: str) -> Mapping[int, str]:
    """Roles of the operands, by their numbers, from those of the arguments."""
    found: dict[int, str] = {}
    number = 0
    for position, arg in enumerate(call.args):
        if isinstance(arg, Value):
            found[number] = roles[position] if position < len(roles) else " "
            number += 1
    return found


def _text(role: str, shape: Shape, prefix: str) -> str:
    """The factors of one operand or result."""
    if role == "m":
        return mask(shape, "_q")
    if role == "l" and len(shape) > 1:
        return " ".join(["b", "(h g)", *(f"_{prefix}{n}" for n in range(2, len(shape)))])
    return HEADS.get(role) or " ".join(letters(shape, prefix, whole=range(len(shape))))


def _forward(kind: str) -> Callable[[Call], Rule | None]:
    return lambda call: _rule(call, _FORWARD[kind], "ol", _DROPOUTS[kind][0])


def _backward(kind: str) -> Callable[[Call], Rule | None]:
    return lambda call: _rule(call, _BACKWARD[kind], "qkv", _DROPOUTS[kind][1])


RULES = {
    **{f"aten._scaled_dot_product_{kind}_attention.default": _forward(kind) for kind in _FORWARD},
    **{f"aten._scaled_dot_product_{kind}_attention_backward.default": _backward(kind) for kind in _BACKWARD},
}
