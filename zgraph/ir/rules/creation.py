"""Rules of ops that make tensors of nothing but a shape: each rank makes its part of it."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, letters, written


def filled(call: Call) -> Rule:
    """One number everywhere. Zeros are partial sums too: none of the operands' values matters."""
    if call.name.endswith("_like"):
        return like(call)
    position = 1 if call.name.startswith("new_") else 0
    names = " ".join(letters(call.out()))
    operands = ", ".join("*" for shape in call.ins if shape is not None)
    return written(
        call,
        f"{operands} -> {names}",
        linear=((),) if call.name in ("zeros", "new_zeros") else (),
        local=((position, "shape"),),
    )


def like(call: Call) -> Rule:
    """One number everywhere, of the shape that the operand has here."""
    names = " ".join(letters(call.out()))
    return written(call, f"{names} -> {names}", linear=((0,), ()) if call.name == "zeros_like" else ())


def counted(call: Call) -> Rule:
    """A range, whole."""
    operands = ", ".join("*" for shape in call.ins if shape is not None)
    names = " ".join(letters(call.out(), whole=range(len(call.out()))))
    local = ((0, "made 0"),) if call.op == "aten.arange.default" else ()
    return written(call, f"{operands} -> {names}", local=local)


_FILLED = ("new_zeros", "new_ones", "new_full", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like")

RULES = {
    **{f"aten.{op}.default": filled for op in _FILLED},
    **{f"aten.{op}.default": counted for op in ("arange", "scalar_tensor")},
    **{f"aten.arange.{overload}": counted for overload in ("start", "start_step")},
}
