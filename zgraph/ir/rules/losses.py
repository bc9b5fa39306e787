"""Rules of losses: rows pass where they are summed or left alone; classes are cut where ranks know which they have."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, written


def forward(call: Call) -> Rule | None:
    """The negative log likelihood of rows, whose mean over some is no part of that over all; None with weights."""
    reduction = call.integer(3, "reduction", 1)
    if len(call.shape(0)) != 2 or len(call.ins) != 2:
        return None
    row = "t" if reduction == 2 else "_t"
    return written(call, f"{row} v, {row} -> {row if len(call.out()) else ''}, ", ranked=("v",), same=(1,))


def backward(call: Call) -> Rule | None:
    """Its backward."""
    if len(call.ins) != 4 or len(call.shape(1)) != 2:
        return None
    row = "t" if len(call.shape(0)) == 0 else "_t"
    return written(call, f"{'' if row == 't' else row}, {row} v, {row}, -> {row} v", linear=((0,),), ranked=("v",))


RULES = {
    "aten.nll_loss_forward.default": forward,
    "aten.nll_loss_backward.default": backward,
}
