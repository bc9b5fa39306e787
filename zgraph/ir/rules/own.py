"""Ops on rows that a rank has in an order of its own, on ranks that each have a part of the rows: sorted by expert.

    ids, S0          %k, %p = aten.sort(%ids)         S0 -> O0, O0     each rank sorts its own; %p numbers its own rows
    tokens, S0       %r = aten.index(%x, [%p])        S0, O0 -> O0
    rows, O0         %e = aten.cumsum(histc(%k))      O0 -> P(sum)     counts of a rank's own rows add up to all counts
    rows, O0         %y = aten._grouped_mm(%r, %w, %e)    O0, R, P(sum) -> O0
    inverse, S0      %i = aten.sort(%p)[1]            O0 -> O0, S0
    tokens, S0       %z = aten.index(%y, [%i])        O0, S0 -> S0

What is sorted whole, computed row by row and put back is what each rank makes of its own part: no rank needs another's
rows. That holds of the op of one order alone; `zgraph.ir.orders` follows the orders through a graph. Ids are
not negative, as numbers of experts are, so that counts from 0 on are of all rows in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from zgraph.ir.axis_rules import SUMMED
from zgraph.ir.external_ops import CAST
from zgraph.ir.rules.factors import Call, Rule, Strategy
from zgraph.ir.rules.grouped import row_factor
from zgraph.ir.rules.roles import Mixed, Order, Role, Step
from zgraph.ir.types import DType, Own, Partial, Placement, Replicate, Shard

__all__ = ["FILLS", "SORTS", "begins_order", "own_ways", "routed_in_order", "step_of"]

R, P = Replicate(), Partial("sum")

SORTS = frozenset({"aten.sort.default", "aten.sort.stable"})

Pattern = tuple[tuple[str, ...], tuple[str, ...]]
"""The roles of an op's operands, and those of its results."""


_TABLE: Mapping[str, tuple[Pattern, ...]] = {
    **dict.fromkeys(SORTS, ((("ids",), ("keys", "numbers")), (("numbers",), ("range", "inverse")))),
    "aten.index.Tensor": ((("part", "numbers"), ("rows",)), (("rows", "inverse"), ("part",))),
    "aten.histc.default": ((("keys",), ("counts",)), (("ids",), ("counts",))),
    "aten.cumsum.default": ((("counts",), ("counts",)),),
    "aten.floor_divide.default": ((("numbers",), ("numbers",)),),
    "aten.empty_like.default": ((("rows",), ("none",)), (("numbers",), ("none",))),
    "aten.arange.default": (((), ("range",)),),
}
_SUMMED: tuple[Pattern, ...] = (
    (("part", "numbers", "rows"), ("part",)),
    (("none", "inverse", "part"), ("rows",)),
)
_WRITTEN: tuple[Pattern, ...] = ((("none", "numbers", "range"), ("inverse",)),)
_PRODUCT: tuple[Pattern, ...] = ((("rows", "whole", "counts"), ("rows",)), (("columns", "rows", "counts"), ("sum",)))
_BACKWARD: tuple[Pattern, ...] = ((("rows", "whole", "counts", "rows"), ("rows", "sum")),)

_PUTS = frozenset({"aten.index_put.default", "aten.index_put_.default"})
_PASSES = frozenset({CAST, "aten.clone.default", "aten.detach.default", "aten.alias.default"})
"""Ops that leave integers what they are, in any dtype but a narrow one."""

_NARROW = frozenset({DType.bool, DType.i8, DType.u8})

_OWN = frozenset({"keys", "rows", "numbers", "range", "none"})

FILLS = frozenset(
    f"aten.{op}.default"
    for op in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like")
)
"""Ops whose rows are alike, so that they are right in any order."""


def _patterns(call: Call) -> tuple[Pattern, ...]:
    """The patterns of an op; none where it has no row, or is called otherwise."""
    if call.op in _PUTS:
        is_plain = len(call.ins) == 3 and _is_by_rows(call)
        return () if not is_plain else _SUMMED if call.arg(3, "accumulate", False) is True else _WRITTEN
    if call.op.endswith("grouped_mm_fallback_backward.default"):
        return _BACKWARD
    if call.op in ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"):
        return _PRODUCT if len(call.ins) == 3 else ()
    rows = _TABLE.get(call.op, ())
    if call.op in SORTS:
        position = 1 if call.op.endswith("default") else 2
        ways = call.arg(position, "dim", -1), call.arg(position + 1, "descending", False)
        return rows if len(call.shape(0)) == 1 and ways[0] in (0, -1) and ways[1] is False else ()
    is_plain = True
    match call.name:
        case "index":
            is_plain = len(call.ins) == 2 and _is_by_rows(call)
        case "histc":
            is_plain = len(call.args) == 4 and call.integer(2, "min", 1) <= 0 < call.integer(3, "max", 0)
        case "cumsum":
            is_plain = len(call.shape(0)) == 1
        case "floor_divide":
            is_plain = len(call.ins) == 1 and call.integer(1, "other", 0) > 0
    return rows if is_plain else ()


def _is_by_rows(call: Call) -> bool:
    """Whether the one index that a call has is of its first dim."""
    return isinstance(call.args[1], tuple) and len(call.args[1]) == 1 and len(call.shape(1)) == 1


def _place(word: str, blocks: tuple[int, ...]) -> Placement:
    """Where what has a role is."""
    if word in _OWN or word == "columns":
        return Own(1 if word == "columns" else 0)
    if word in ("part", "ids", "inverse"):
        return Shard(0, blocks)
    return P if word in ("counts", "sum") else R


def _strategy(call: Call, pattern: Pattern, blocks: tuple[int, ...]) -> Strategy | None:
    """The strategy of a pattern; None where it has other operands."""
    sides = []
    for words, shapes in zip(pattern, (call.ins, call.outs), strict=True):
        if len(words) != len(shapes) or any(shape is None for shape in shapes):
            return None
        sides.append(tuple(_place(word, blocks) for word in words))
    return Strategy(*sides)


def routed_in_order(places: Sequence[Placement], *, is_put: bool) -> list[Placement]:
    """Where the result may be of an op that looks rows up by index, or adds them, of operands that are placed so."""
    blocks = next((p.blocks for p in places if isinstance(p, Shard)), (1,))
    patterns = _SUMMED if is_put else _TABLE["aten.index.Tensor"]
    found = [[_place(word, blocks) for word in (*words, *made)] for words, made in patterns]
    return [way[-1] for way in found if way[:-1] == list(places)]


def own_ways(call: Call, rule: Rule | None, places: Sequence[Placement | None], num_ranks: int) -> list[Strategy]:
    """The strategies of an op that reads, or makes, rows in an order of the rank's own.

    Args:
        call: on the tensors of all ranks.
        rule: its rule; None where it has none.
        places: of its operands, and then of its results.
        num_ranks: ranks along the axis.
    """
    blocks = next((p.blocks for p in places if isinstance(p, Shard)), (1,))
    found = [way for p in _patterns(call) if (way := _strategy(call, p, blocks)) is not None]
    tensors = zip((*rule.ins, *rule.outs), places, strict=True) if rule is not None else ()
    read = [(dims, place) for dims, place in tensors if isinstance(place, Own)]
    if call.op in _PASSES and len(call.ins) == 1 and isinstance(places[0], Own):
        found.append(Strategy((Own(places[0].dim),), (Own(places[0].dim),)))
    elif rule is not None and read:
        rows = row_factor(rule, read[0][0], read[0][1].dim)
        passed = _passed(rule, rows, num_ranks) if rows else None
        found += [passed] if passed is not None else []
    return found


def _passed(rule: Rule, rows: str, num_ranks: int) -> Strategy | None:
    """The strategy of an op through which rows pass, or that sums over them; None for any other."""
    if rule.groups or rule.reduce != "sum" or rows in rule.ranked or rows in rule.joins:
        return None
    way = rule.with_cut(num_ranks, (rows, (1,)))
    if way is None or R in way.outs:
        return None
    places = [*way.ins, *way.outs]
    tensors = zip((*rule.ins, *rule.outs), places, strict=True)
    if any(isinstance(place, Shard) and row_factor(rule, dims, place.dim) != rows for dims, place in tensors):
        return None
    own = [Own(place.dim) if isinstance(place, Shard) else place for place in places]
    return Strategy(tuple(own[: len(way.ins)]), tuple(own[len(way.ins) :]))


def begins_order(call: Call) -> bool:
    """Whether a call sorts integers that may begin an order."""
    return call.op in SORTS and bool(_patterns(call)) and isinstance(call.shape(0)[0], int)


def step_of(call: Call, rule: Rule | None, roles: Sequence[Role | None], num_ranks: int) -> Step | None:
    """How an op is placed by what its operands are in an order; None where it is placed without regard to that.

    Args:
        call: on the tensors of all ranks.
        rule: its rule; None where it has none.
        roles: of its operands.
        num_ranks: ranks along the axis.

    Raises:
        Mixed: it reads rows in a rank's own order otherwise than row by row, or those of two orders.
    """
    if rule is not None:  # what is read for its type alone has no part
        roles = [None if dims is None else role for dims, role in zip(rule.ins, roles, strict=True)]
    present = [role for role in roles if role is not None]
    if not present:
        return None
    orders = {role.order for role in present}
    order = present[0].order
    if len(orders) == 1:
        for pattern in _patterns(call):
            way = _strategy(call, pattern, order.blocks)
            if way is not None and _matches(call, pattern, roles, order, num_ranks):
                return Step(way, tuple(_made(call, word, order, roles) for word in pattern[1]))
    words = {role.word for role in present}
    if len(call.ins) == 1 and call.op in _PASSES and call.dtypes[1][0] not in _NARROW:
        (role,) = roles
        if role is not None:
            place = Own(role.dim) if role.word in _OWN else _place(role.word, order.blocks)
            return Step(Strategy((place,), (place,)), (role,))
    if words <= {"ids", "counts"}:
        return None
    if len(orders) > 1:
        raise Mixed("it reads rows of two orders")
    if not words <= {"rows", "keys"} or rule is None:
        raise Mixed("it reads rows in an order of the rank's own otherwise than row by row")
    return _by_rows(call, rule, roles, order, num_ranks)


def _by_rows(call: Call, rule: Rule, roles: Sequence[Role | None], order: Order, num_ranks: int) -> Step:
    """The step of an op that takes rows one by one, or sums over them."""
    found = {row_factor(rule, dims, role.dim) for dims, role in zip(rule.ins, roles, strict=True) if role is not None}
    rows = found.pop() if len(found) == 1 else ""
    way = _passed(rule, rows, num_ranks) if rows else None
    if way is None:
        raise Mixed(f"{call.name} mixes rows in an order of the rank's own")
    if any(place == P and dtype not in SUMMED for place, dtype in zip(way.outs, call.dtypes[1], strict=True)):
        raise Mixed(f"{call.name} sums integers over rows, which ranks do not add up")
    made = tuple(Role("rows", order, place.dim) if isinstance(place, Own) else None for place in way.outs)
    return Step(way, made)


def _matches(call: Call, pattern: Pattern, roles: Sequence[Role | None], order: Order, num_ranks: int) -> bool:
    """Whether operands are what a pattern reads."""
    per = next((role.per for role in roles if role is not None and role.word == "numbers"), 1)
    if per > 1 and "inverse" in pattern[1]:
        return False
    for word, role, shape in zip(pattern[0], roles, call.ins, strict=True):
        if word == "part":  # tokens, of which each has as many rows
            count = shape[0] if shape else 0
            if role is not None and role.word != "ids":
                return False
            if not isinstance(count, int) or count * per != order.num_rows:
                return False
            if not Shard(0, order.blocks).divides(count, num_ranks):
                return False
        elif word == "none":  # all of it is written, or it is added to
            if (role is not None and role.word != "rows") or not shape or shape[0] != order.num_rows:
                return False
        elif word == "whole":
            if role is not None:
                return False
        elif role is None or role.word != ("rows" if word == "columns" else word) or role.dim != (word == "columns"):
            return False
    return True


def _made(call: Call, word: str, order: Order, roles: Sequence[Role | None]) -> Role | None:
    """The part that a result has."""
    if word not in ("keys", "rows", "numbers", "range", "inverse", "counts"):
        return None
    role = Role(word, order)
    if call.op == "aten.floor_divide.default" and (before := roles[0]) is not None:
        return replace(role, per=before.per * call.integer(1, "other", 1))
    return role
