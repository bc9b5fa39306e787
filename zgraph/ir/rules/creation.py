"""Rules of ops that make tensors of nothing but a shape: each rank makes its part of it."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, letters, written


def filled(call: Call) -> Rule:
    """One number everywhere. Zeros are partial sums too: none of the operands' values matters."""
    position = 1 if call.name.startswith("new_") else 0
    names = " ".join(letters(call.out()))
    zeros = call.name in ("zeros", "new_zeros", "zeros_like")
    sized = not call.name.endswith("_like")
    operands = ", ".join("*" for shape in call.ins if shape is not None)
    return written(
        call,
        f"{operands} -> {names}",
        linear=((),) if zeros else (),
        local=((position, "shape"),) if sized else (),
    )


def counted(call: Call) -> Rule:
    """A range, whole."""
    operands = ", ".join("*" for shape in call.ins if shape is not None)
    return written(call, f"{operands} -> {' '.join(letters(call.out(), whole=range(len(call.out()))))}")


RULES = {
    **{f"aten.{op}.default": filled for op in ("new_zeros", "new_ones", "zeros", "ones", "full", "new_full")},
    **{f"aten.{op}.default": counted for op in ("arange", "scalar_tensor")},
    **{f"aten.arange.{overload}": counted for overload in ("start", "start_step")},
}
