"""Rules of products of many matrices with groups of rows, one matrix a group: the layers of experts.

Rows lie group by group, and running counts say where each group ends, so rows and groups are whole, or a rank has some
of the groups, and their rows. Each expert is cut as a layer is: along columns, or along what is summed over.
"""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, written

GROUPS = ("_t", "_e")


def forward(call: Call) -> Rule | None:
    """Rows times the matrix of their group; None without running counts, or where both are lists of matrices."""
    if len(call.ins) != 3 or len(call.shape(0)) != 2:
        return None
    if len(call.shape(1)) == 2:  # gradients of the matrices
        return written(call, "k _t, _t n, _o -> _e k n", linear=((0,), (1,)), groups=GROUPS)
    return written(call, "_t k, _e k n, _o -> _t n", linear=((0,), (1,)), groups=GROUPS)


def backward(call: Call) -> Rule:
    """Gradients of rows and of matrices."""
    return written(call, "_t k, _e k n, _o, _t n -> _t k, _e k n", linear=((3,),), groups=GROUPS)


RULES = {
    "aten._grouped_mm.default": forward,
    "transformers.grouped_mm_fallback.default": forward,
    "transformers.grouped_mm_fallback_backward.default": backward,
}
