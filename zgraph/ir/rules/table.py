"""The table: one row an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zgraph.ir.rules import (
    attention,
    creation,
    device_attention,
    experts,
    integers,
    lookups,
    losses,
    norms,
    pieces,
    pointwise,
    products,
    reductions,
    views,
)
from zgraph.ir.rules.factors import Call, Rule

__all__ = ["RULES", "rule_of"]

RULES: Mapping[str, Callable[[Call], Rule | None]] = {
    **pointwise.RULES,
    **products.RULES,
    **views.RULES,
    **pieces.RULES,
    **reductions.RULES,
    **attention.RULES,
    **device_attention.RULES,
    **norms.RULES,
    **lookups.RULES,
    **losses.RULES,
    **creation.RULES,
    **experts.RULES,
    **integers.RULES,
}
"""A function for each op, from a call to its factors; None where the call has none."""


def rule_of(call: Call) -> Rule | None:
    """The rule of a call on whole tensors; None where its operands must be whole."""
    row = RULES.get(call.op)
    return row(call) if row is not None else None
