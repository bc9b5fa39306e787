"""Rules of ops that compute each element of the result from the same element of the operands, broadcast."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir.rules.factors import Call, Rule, Shape, letters, written
from zgraph.ir.types import DType

FIRST = ((0,),)

LINEAR: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "add": ((0, 1),),
    "alias": FIRST,
    "clone": FIRST,
    "_to_copy": FIRST,
    "detach": FIRST,
    "div": FIRST,
    "gelu_backward": FIRST,
    "lift_fresh_copy": FIRST,
    "mul": ((0,), (1,)),
    "native_dropout_backward": FIRST,
    "neg": FIRST,
    "sigmoid_backward": FIRST,
    "silu_backward": FIRST,
    "sub": ((0, 1),),
    "tanh_backward": FIRST,
    "threshold_backward": FIRST,
    "where": ((1, 2),),
}
"""Ops that are linear, and in which operands together."""

_KINDS = ("Tensor", "Scalar")

OPS = (
    *("abs", "alias", "ceil", "clone", "cos", "detach", "erf", "exp", "floor", "gelu", "isnan", "lift_fresh_copy"),
    *("log", "log1p", "logical_not", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sign", "silu", "sin", "sqrt"),
    *("tanh", "_to_copy", "expm1", "softplus", "hardtanh", "leaky_relu", "elu", "bitwise_not", "trunc", "round"),
    *(
        "gelu_backward",
        "native_dropout_backward",
        "sigmoid_backward",
        "silu_backward",
        "tanh_backward",
        "threshold_backward",
        "maximum",
        "minimum",
    ),
    *("floor_divide", "logical_and", "logical_or", "clamp", "clamp_min", "clamp_max", "softplus_backward"),
)
"""Ops whose overloads all are so."""

OVERLOADS = (
    *(f"{op}.{kind}" for op in ("add", "div", "eq", "ge", "gt", "le", "lt", "mul", "ne", "sub") for kind in _KINDS),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsub.Scalar", "remainder.Scalar", "remainder.Tensor", "where.self"),
    *("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "masked_fill.Scalar", "div.Tensor_mode"),
    "clamp.Tensor",
)
"""Overloads that are so, of ops with others that are not."""

_WIDTHS = {DType.bf16: 1, DType.f16: 1, DType.f32: 2, DType.f64: 3}


def pointwise(call: Call) -> Rule:
    """A factor a dim; a dim of an operand that is broadcast is whole."""
    out = call.out()
    ins = ", ".join(broadcast(shape, out, f"_one{i}_") for i, shape in enumerate(call.ins) if shape is not None)
    return written(call, f"{ins} -> {' '.join(letters(out))}", linear=_linear(call))


def broadcast(shape: Shape, out: Shape, one: str) -> str:
    """The factors of an operand that is broadcast to the shape of a result.

    Raises:
        ValueError: it cannot be.
    """
    lead = len(out) - len(shape)
    names = letters(out)[lead:]
    if lead < 0 or any(isinstance(s, int) and s not in (1, n) for s, n in zip(shape, out[lead:], strict=True)):
        raise ValueError(f"{shape} is not broadcast to {out}")
    return " ".join(
        name if size == full else f"{one}{i}"
        for i, (name, size, full) in enumerate(zip(names, shape, out[lead:], strict=True))
    )


def _linear(call: Call) -> tuple[tuple[int, ...], ...]:
    if call.op == "aten.div.Tensor_mode" or (call.name == "_to_copy" and not _widens(call)):
        return ()  # a quotient is rounded; so are parts of a sum, which is not to round the sum
    if call.name == "masked_fill" and call.arg(2, "value", None) == 0:
        return FIRST
    groups = LINEAR.get(call.name, ())
    return tuple(group for group in groups if max(group) < len(call.ins))  # x + 1 is not linear, x * 2 is


def _widens(call: Call) -> bool:
    """Whether a cast is to the same or a wider float."""
    old, new = call.dtypes[0][0], call.dtypes[1][0]
    return old == new or (old is not None and new is not None and _WIDTHS.get(old, 9) < _WIDTHS.get(new, 0))


RULES = {
    **{f"aten.{op}.default": pointwise for op in OPS},
    **{f"aten.{op}": pointwise for op in OVERLOADS},
}
