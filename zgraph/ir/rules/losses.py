"""Rules of losses: rows pass where they are summed or left alone; classes are whole."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, written


def forward(call: Call) -> Rule:
    """The negative log likelihood: a mean over some rows is no part of the mean over all."""
    reduction = call.integer(3, "reduction", 1)
    if len(call.shape(0)) != 2 or len(call.ins) != 2:
        rows = ", ".join(" ".join(f"_i{k}_{d}" for d in range(len(s or ()))) for k, s in enumerate(call.ins))
        outs = ", ".join(" ".join(f"_o{k}_{d}" for d in range(len(s or ()))) for k, s in enumerate(call.outs))
        return written(call, f"{rows} -> {outs}")
    row = "t" if reduction == 2 else "_t"
    return written(call, f"{row} _v, {row} -> {row if len(call.out()) else ''}, ")


def backward(call: Call) -> Rule | None:
    """Its backward."""
    if len(call.ins) != 4 or len(call.shape(1)) != 2:
        return None
    row = "t" if len(call.shape(0)) == 0 else "_t"
    return written(call, f"{'' if row == 't' else row}, {row} _v, {row}, -> {row} _v", linear=((0,),))


RULES = {
    "aten.nll_loss_forward.default": forward,
    "aten.nll_loss_backward.default": backward,
}
