"""Factors: what each dim of an op's operands and results is made of, and so how they may be cut along a model axis.

A rule has, for each tensor, its dims as products of *factors*, outermost first, in the letters of an einsum:

    mm      "m k, k n -> m n"         cut m: S0, R -> S0.   cut n: R, S1 -> S1.   cut k: S1, S0 -> P(sum), as no result
                                      has k.
    view    "b (h d) -> b h d"        cut h: S1 -> S1.      cut d: S1/<h> -> S2, as d is cut in each of the h blocks.
    split   "b x+ -> b x, b x"        cut x: S1/2 -> S1, S1: what has `x+` is made of parts that have x each.
    lookup  "v d, t -> t d"           cut v: S0, R -> P(sum), by an op that knows which rows its rank has.

A factor that begins with `_` is never cut. A tensor that is `*` may be placed in any way: only its type is read. From
factors alone a rule knows how placements go together, one *strategy* for each way: a factor that is cut, or operands
that an op is linear in, which may be partial sums.

Source: GSPMD (Xu et al., 2021) and Shardy propagate factors likewise; `_StridedShard` of DTensor is a cut in blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from zgraph.ir.graph import Arg, Node
from zgraph.ir.symbols import Dim, simplify
from zgraph.ir.types import MAX_BLOCKS, DType, Partial, Placement, Reduction, Replicate, Shard, TensorType

__all__ = ["Call", "Cut", "Dims", "Rule", "Shape", "Strategy", "letters", "written"]

R, P = Replicate(), Partial("sum")

Shape = tuple[Dim, ...]

Dims = tuple[tuple[str, ...], ...]
"""The factors of each dim of a tensor."""

Cut = tuple[str, tuple[int, ...]]
"""A factor, and the blocks of it that are cut, as in `Shard`."""

_GROUP = re.compile(r"\([^)]*\)|\S+")


@dataclass(frozen=True)
class Call:
    """One call of an op on whole tensors, as far as a rule asks.

    Args:
        op: its name.
        args: its arguments, sizes in them those of whole tensors.
        kwargs: the same of its keyword arguments.
        ins: the shape of each operand; None of what is no tensor.
        outs: the same of each result.
        dtypes: of operands and results.
    """

    op: str
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg]
    ins: tuple[Shape | None, ...]
    outs: tuple[Shape | None, ...]
    dtypes: tuple[tuple[DType | None, ...], tuple[DType | None, ...]]

    @classmethod
    def of(cls, node: Node) -> Call:
        """The call of a node whose types are those of whole tensors."""
        sides = [[v.type if isinstance(v.type, TensorType) else None for v in s] for s in (node.operands, node.results)]
        ins, outs = (tuple(None if k is None else tuple(map(simplify, k.shape)) for k in side) for side in sides)
        dtypes = tuple(tuple(None if k is None else k.dtype for k in side) for side in sides)
        return cls(node.op, node.args, dict(node.kwargs), ins, outs, (dtypes[0], dtypes[1]))

    @property
    def name(self) -> str:
        """The op's name without namespace and overload."""
        return self.op.split(".")[1]

    def shape(self, index: int) -> Shape:
        """The shape of an operand that is a tensor."""
        found = self.ins[index]
        assert found is not None, f"operand {index} of {self.op} is no tensor"
        return found

    def out(self, index: int = 0) -> Shape:
        """The shape of a result that is a tensor."""
        found = self.outs[index]
        assert found is not None, f"result {index} of {self.op} is no tensor"
        return found

    def arg(self, index: int, name: str, default: Arg) -> Arg:
        """An argument by its position or name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def integer(self, index: int, name: str, default: int) -> int:
        """An argument that is an integer."""
        found = self.arg(index, name, default)
        return found if isinstance(found, int) else default

    def integers(self, index: int, name: str) -> tuple[int, ...]:
        """An argument that is a list of integers; empty where it is another."""
        found = self.arg(index, name, ())
        return tuple(n for n in found if isinstance(n, int)) if isinstance(found, tuple) else ()


@dataclass(frozen=True)
class Strategy:
    """How the operands of a node must be placed along an axis, and how its results are then.

    Args:
        ins: the placement of each operand; None where any is right, or it is no tensor.
        outs: that of each result; None of what is no tensor.
    """

    ins: tuple[Placement | None, ...]
    outs: tuple[Placement | None, ...]


@dataclass(frozen=True)
class Rule:
    """Factors of one call.

    Args:
        ins: of each operand; None of what is no tensor or may be placed in any way.
        outs: of each result.
        sizes: of each factor.
        linear: groups of operands that the op is linear in together: a sum of each makes the sum of what it makes of
            them.
        added: operands that count once where a cut makes results partial sums: a bias.
        local: arguments that are sizes: see `zgraph.ir.rules.local`.
        joins: of a factor whose parts are joined, their sizes.
        ranked: factors that an op cuts which knows its rank (`zgraph.ir.rules.ranked`): whose index is a value.
        same: results that all ranks have the whole of where such a factor is cut; any factor, if there is none such.
        reduce: what results are pending that lack a factor which is cut.
        fixed: factors that are not cut any more: those that the op knows its rank for along another axis.
        groups: the factor of rows that lie group by group, and that of the groups (`zgraph.ir.rules.grouped`).
    """

    ins: tuple[Dims | None, ...]
    outs: tuple[Dims | None, ...]
    sizes: Mapping[str, Dim]
    linear: tuple[tuple[int, ...], ...] = ()
    added: tuple[int, ...] = ()
    local: tuple[tuple[int, str], ...] = ()
    joins: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranked: tuple[str, ...] = ()
    same: tuple[int, ...] = ()
    reduce: Reduction = "sum"
    groups: tuple[str, str] | None = None
    fixed: tuple[str, ...] = ()

    def place(self, dims: Dims | None, cut: Cut) -> Shard | None:
        """Where a cut of a factor is in a tensor of these dims; None if it does not have the factor."""
        factor, blocks = cut
        for dim, group in enumerate(dims or ()):
            if f"{factor}+" in group:
                return Shard(dim, _joined(self.joins[factor], blocks))
            if factor in group:
                outer = math.prod(int(self.sizes[f]) for f in group[: group.index(factor)])
                return Shard(dim, blocks * outer) if outer * len(blocks) <= MAX_BLOCKS else None
        return None

    def cut(self, dims: Dims | None, place: Shard, num_ranks: int) -> Cut | None:
        """The cut that places a tensor of these dims so; None if there is none that is allowed."""
        return next((cut for cut in self._meant(dims, place) if self.allows(cut, num_ranks)), None)

    def followed(self, dims: Dims | None, place: Shard) -> Cut | None:
        """The factor that a cut of a tensor of these dims is in, be it one that is never cut; None if none is."""
        return next(self._meant(dims, place), None)

    def _meant(self, dims: Dims | None, place: Shard) -> Iterator[Cut]:
        """The cuts that place a tensor of these dims so, of factors of one size each, the outermost first."""
        if dims is None or place.dim >= len(dims):
            return
        group, outer = dims[place.dim], 1
        if group and group[0].endswith("+"):
            factor = group[0][:-1]
            if (parts := _part(self.joins[factor], place.blocks)) is not None:
                yield factor, parts
            return
        for factor in group:
            if not isinstance(self.sizes[factor], int):
                return
            each, rest = divmod(len(place.blocks), outer)
            if rest or not each:
                return
            cut = factor, Shard(0, place.blocks[:each]).blocks
            if self.place(dims, cut) == place:
                yield cut
            outer *= int(self.sizes[factor])

    def allows(self, cut: Cut, num_ranks: int) -> bool:
        """Whether a factor may be cut so."""
        factor, blocks = cut
        if factor[0] == "_" or factor not in self.sizes or factor in self.fixed:
            return False
        if factor in self.ranked and len(blocks) > 1:
            return False  # a rank's indices follow one another
        sizes = self.joins.get(factor) or (self.sizes[factor],)
        return all(Shard(0, blocks).divides(size, num_ranks) for size in sizes)

    def strategies(self, num_ranks: int, cuts: Iterable[Cut]) -> list[Strategy]:
        """The ways to place operands and results along an axis: all whole, with one of these cuts, or partial sums."""
        found = [self.whole]
        found += [s for cut in dict.fromkeys(cuts) if (s := self.with_cut(num_ranks, cut)) is not None]
        found += [self.with_sums(group) for group in self.linear]
        return list(dict.fromkeys(found))

    @property
    def whole(self) -> Strategy:
        """All whole."""
        return Strategy(
            tuple(None if d is None else R for d in self.ins), tuple(None if d is None else R for d in self.outs)
        )

    def with_cut(self, num_ranks: int, cut: Cut) -> Strategy | None:
        """The strategy that cuts a factor; None if it may not be cut so."""
        if not self.allows(cut, num_ranks):
            return None
        has = [dims is not None and _has(dims, cut[0]) for dims in (*self.ins, *self.outs)]
        places = [self.place(dims, cut) for dims in (*self.ins, *self.outs)]
        if any(here and place is None for here, place in zip(has, places, strict=True)):
            return None
        ins, outs = places[: len(self.ins)], places[len(self.ins) :]
        summed = any(d is not None and p is None for d, p in zip(self.outs, outs, strict=True))
        pending = Partial(self.reduce)
        return Strategy(
            tuple(
                None if d is None else p or (P if summed and i in self.added else R)
                for i, (d, p) in enumerate(zip(self.ins, ins, strict=True))
            ),
            tuple(
                None if d is None else p or (R if i in self.same and self._is_same(cut) else pending)
                for i, (d, p) in enumerate(zip(self.outs, outs, strict=True))
            ),
        )

    def _is_same(self, cut: Cut) -> bool:
        """Whether results in `same` are whole on all ranks where this is cut."""
        return not self.ranked or cut[0] in self.ranked

    def with_sums(self, group: tuple[int, ...]) -> Strategy:
        """The strategy in which these operands are partial sums."""
        return Strategy(
            tuple(None if d is None else P if i in group else R for i, d in enumerate(self.ins)),
            tuple(None if d is None else P for d in self.outs),
        )


def _has(dims: Dims, factor: str) -> bool:
    return any(factor in group or f"{factor}+" in group for group in dims)


def _joined(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks of what is joined of parts of these sizes, each cut in `blocks`."""
    unit = sum(blocks)
    return tuple(size * b for size in sizes for b in blocks) if unit else ()


def _part(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...] | None:
    """The blocks of each of the parts that something cut in `blocks` is joined of; None if they are not alike."""
    total, unit = sum(sizes), sum(blocks)
    ends = [end * total for end in accumulate(blocks)]
    borders = [end * unit for end in accumulate(sizes)]
    if not set(borders) <= set(ends):
        return None
    found: list[list[int]] = [[] for _ in sizes]
    for block, end in zip(blocks, ends, strict=True):
        found[next(i for i, border in enumerate(borders) if end <= border)].append(block)
    alike = {Shard(0, tuple(part)).blocks for part in found}
    return alike.pop() if len(alike) == 1 else None


def letters(shape: Shape, prefix: str = "d", whole: Iterable[int] = ()) -> list[str]:
    """A factor for each dim: d0, d1, ...; those of size 1, of no known size, and those in `whole` never cut."""
    kept = set(whole)
    return [
        f"{'_' if size == 1 or i in kept or not isinstance(size, int) else ''}{prefix}{i}"
        for i, size in enumerate(shape)
    ]


def written(
    call: Call,
    text: str,
    *,
    sizes: Mapping[str, Dim] | None = None,
    linear: tuple[tuple[int, ...], ...] = (),
    added: tuple[int, ...] = (),
    local: tuple[tuple[int, str], ...] = (),
    joins: Mapping[str, tuple[int, ...]] | None = None,
    ranked: tuple[str, ...] = (),
    same: tuple[int, ...] = (),
    reduce: Reduction = "sum",
    groups: tuple[str, str] | None = None,
) -> Rule:
    """A rule from its text, in which operands and results that are no tensors are left out.

    Sizes of factors that are alone in a dim are read off the shapes.

    Raises:
        ValueError: the text does not fit the shapes.
    """
    known: dict[str, Dim] = dict(sizes or {})
    sides: list[tuple[Dims | None, ...]] = []
    for side, shapes in zip(text.split("->"), (call.ins, call.outs), strict=True):
        parts = iter(side.split(",") if any(s is not None for s in shapes) else ())
        tensors: list[Dims | None] = []
        for shape in shapes:
            part = None if shape is None else next(parts, None)
            if shape is None or part is None or part.strip() == "*":
                tensors.append(None)
                continue
            dims = tuple(tuple(group.strip("()").split()) for group in _GROUP.findall(part))
            if len(dims) != len(shape):
                raise ValueError(f"{call.op}: {part.strip()!r} is not of a tensor of shape {shape}")
            for group, size in zip(dims, shape, strict=True):
                if len(group) == 1 and not group[0].endswith("+") and group[0] not in (joins or {}):
                    if known.setdefault(group[0], size) != size:
                        raise ValueError(f"{call.op}: {text}: {group[0]} is {known[group[0]]} and {size}")
            tensors.append(dims)
        sides.append(tuple(tensors))
    known.update(dict.fromkeys(joins or {}, 0))
    sums = all(d is None or d in _FLOATS for d in call.dtypes[1])
    linear = linear if sums else ()
    return Rule(sides[0], sides[1], known, linear, added, local, joins or {}, ranked, same, reduce, groups)


_FLOATS = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16, DType.c64, DType.c128})
