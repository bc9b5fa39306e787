"""Constants that a weight in integers is made of: their targets in graphs, and where they lie on several ranks."""

from __future__ import annotations

from zgraph.ir import Placement, Shard

__all__ = ["int8_of", "integers_cut", "integers_of", "outliers_of"]

Cuts = tuple[tuple[str, Placement], ...]
"""How something lies along axes, by their names."""

Shards = tuple[tuple[str, Shard], ...]
"""How something is cut: along which axes, and where."""


def outliers_of(weight: str) -> str:
    """The target of the constant that says which columns of what meets a weight are kept, by the weight's target."""
    return f"outliers:{weight}"


def integers_of(weight: str) -> tuple[str, str]:
    """The targets of the constants that are a weight's int4, two in a byte, and their scales."""
    return f"int4:{weight}", f"int4_scales:{weight}"


def int8_of(weight: str) -> tuple[str, str]:
    """The targets of the constants that are a weight's int8 and its scales."""
    return f"int8:{weight}", f"int8_scale:{weight}"


def integers_cut(cuts: Cuts, *, is_turned: bool, in_int4: bool) -> tuple[Shards, Shards]:
    """How integers and scales lie whose weight is cut so.

    Args:
        cuts: of the weight.
        is_turned: whether the weight is [columns, outputs], as GPT-2's.
        in_int4: whether scales are those of groups, [columns / group, outputs, 2], or [outputs, 1].
    """
    own = [(axis, place) for axis, place in cuts if isinstance(place, Shard)]
    rows = tuple((axis, Shard(1 - p.dim, p.blocks) if is_turned else p) for axis, p in own)
    if in_int4:
        return rows, tuple((axis, Shard(1 - p.dim, p.blocks)) for axis, p in rows)
    return rows, tuple((axis, p) for axis, p in rows if p.dim == 0)
