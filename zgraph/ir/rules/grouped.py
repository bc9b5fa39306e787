"""Ops on rows that lie group by group, on ranks that each have the rows of some groups: an op's way to place them.

    _grouped_mm    "t k, e k n, o -> t n"      cut e: G0, S0, R -> G0.    t, e, o: rows, groups, running counts
    mul            "d0 d1, d0 _one -> d0 d1"   G0, G0 -> G0: rows pass, whichever a rank has
    t              "d0 d1 -> d1 d0"            G0 -> G1

An op that is told where groups end takes the rank's groups for all, so that it is one which knows its rank
(`zgraph.ir.rules.ranked`).
"""

from __future__ import annotations

from collections.abc import Sequence

from zgraph.ir.rules.factors import Dims, Rule, Strategy
from zgraph.ir.types import Grouped, Placement, Replicate, Shard

__all__ = ["by_groups", "placed_by_groups", "row_factor"]

R = Replicate()


def by_groups(rule: Rule, rows: str) -> Strategy | None:
    """The strategy of ranks that have the rows of some groups; None if the op mixes rows.

    Args:
        rule: of the op.
        rows: the factor of rows.
    """
    groups = rule.groups[1] if rule.groups and rule.groups[0] == rows else ""
    if rows not in rule.sizes or (not groups and (rows[0] == "_" or rows in rule.ranked)):
        return None
    places = [_place(dims, rows, groups) for dims in (*rule.ins, *rule.outs)]
    ins, outs = places[: len(rule.ins)], places[len(rule.ins) :]
    if any(place is None and dims is not None for place, dims in zip(outs, rule.outs, strict=True)):
        return None
    if any(place is None and dims is not None and _has(dims, rows) for place, dims in zip(ins, rule.ins, strict=True)):
        return None
    filled = (place or (R if dims is not None else None) for place, dims in zip(ins, rule.ins, strict=True))
    return Strategy(tuple(filled), tuple(outs))


def row_factor(rule: Rule, dims: Dims | None, dim: int) -> str:
    """The factor of a dim of a tensor that is rows; empty if the dim is made of several, or is read in any way."""
    if dims is None or dim >= len(dims) or len(dims[dim]) != 1 or dims[dim][0].endswith("+"):
        return ""
    return dims[dim][0]


def placed_by_groups(rule: Rule, places: Sequence[Placement | None]) -> Strategy | None:
    """The strategy of operands and results of which some are placed so; None if there is none."""
    for dims, place in zip((*rule.ins, *rule.outs), places, strict=True):
        if isinstance(place, Grouped) and dims is not None:
            return by_groups(rule, row_factor(rule, dims, place.dim))
    return None


def _place(dims: Dims | None, rows: str, groups: str) -> Placement | None:
    """Where a tensor of these dims is; None if it has neither rows nor groups, or rows in a dim of more factors."""
    for dim, group in enumerate(dims or ()):
        if group == (rows,):
            return Grouped(dim)
        if groups and group == (groups,):
            return Shard(dim)
    return None


def _has(dims: Dims, factor: str) -> bool:
    return any(factor in group or f"{factor}+" in group for group in dims)
