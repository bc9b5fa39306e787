"""Scalar steps as terms: what kernels are made of, and what ops of ATen are spelled out in.

A term is the sequence of a value's numbers, whatever shape it is seen in. What reads a value says how it lies in the
result: as it is, one number for each row, for each column, or for all. What is repeated along dims of size 1 is read as
what is repeated. Additions may be in any order, the factors of a product too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from zgraph.certify.terms import ZERO, Terms
from zgraph.codegen.spec import Step
from zgraph.ir import DType, TensorType, Value
from zgraph.ir.symbols import Dim

_CARRY_ZERO = frozenset({"copy", "neg", "row_sum", "col_sum"})


@dataclass(frozen=True)
class Sized:
    """A term with its shape: what reads it must know how it lies."""

    term: int
    shape: tuple[Dim, ...]

    @property
    def numel(self) -> Dim:
        return TensorType(DType.f32, self.shape).numel

    @property
    def last(self) -> Dim:
        return self.shape[-1] if self.shape else 1


Number = Sized | float


class Steps(Terms):
    """A table of terms in scalar steps: with the addends of sums, and what transposes and expanded values are of."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, tuple[Hashable, ...]] = {}
        self.turned: dict[int, int] = {}
        self.expanded: dict[int, Sized] = {}

    def run(self, steps: Sequence[Step], names: dict[str, Number], shape: tuple[Dim, ...]) -> None:
        """Add what the steps make to `names`; `shape` is that of a whole value."""
        for step in steps:
            args = [names[a] if isinstance(a, str) else a for a in step.args]
            names[step.name] = self.step(step.op, args, shape)

    def step(self, op: str, args: Sequence[Number], shape: tuple[Dim, ...]) -> Number:
        first = args[0]
        if op == "copy":
            return first
        if op == "random":
            return Sized(self.of("random", self.term(first)), shape)
        if op in ("row_sum", "row_max", "col_sum"):
            assert isinstance(first, Sized)
            made: tuple[Dim, ...] = (first.last,) if op == "col_sum" else (*first.shape[:-1], 1)
            term = ZERO if first.term == ZERO and op in _CARRY_ZERO else self.of(op, first.term, first.last)
            return Sized(term, made)
        bases = [self.expanded.get(a.term, a) if isinstance(a, Sized) else a for a in args]
        made = joined([a for a in bases if isinstance(a, Sized)])
        found = self.add(bases, made) if op == "add" else self.pointwise(op, bases, made)
        whole = joined([a for a in args if isinstance(a, Sized)])
        return found if found.numel == Sized(ZERO, whole).numel else Sized(self.expand(found, whole), whole)

    def pointwise(self, op: str, args: Sequence[Number], shape: tuple[Dim, ...]) -> Sized:
        """A step that makes one number of one number of each argument."""
        result = Sized(ZERO, shape)
        is_zero = [isinstance(a, Sized) and a.term == ZERO for a in args]
        if (op == "mul" and any(is_zero)) or (op in (*_CARRY_ZERO, "div") and is_zero[0]):
            return result
        members = [_member(a, result) for a in args]
        if op == "sub" and is_zero[1] and members[0] == (self.term(args[0]), "same"):
            return replace(result, term=self.term(args[0]))
        if op == "mul":
            members.sort(key=repr)
        return replace(result, term=self.of(op, *members))

    def add(self, args: Sequence[Number], shape: tuple[Dim, ...]) -> Sized:
        """A sum, whose addends may stand in any order."""
        result = Sized(ZERO, shape)
        members: list[Hashable] = []
        for value in args:
            if isinstance(value, Sized) and value.term == ZERO:
                continue
            member = _member(value, result)
            is_whole = isinstance(value, Sized) and member == (value.term, "same")
            members += self.sums.get(self.term(value), (member,)) if is_whole else (member,)
        if len(members) == 1 and isinstance(members[0], tuple) and members[0][1] == "same":
            return replace(result, term=int(members[0][0]))
        if not members:
            return result
        members.sort(key=repr)
        term = self.of("add", *members)
        self.sums[term] = tuple(members)
        return replace(result, term=term)

    def sum(self, a: Sized, b: Sized) -> Sized:
        return self.add((a, b), joined((a, b)))

    def product(self, a: Sized, b: Sized) -> Sized:
        return self.pointwise("mul", (a, b), joined((a, b)))

    def expand(self, value: Sized, shape: tuple[Dim, ...]) -> int:
        """A value repeated along dims of size 1."""
        if value.term == ZERO or value.numel == Sized(ZERO, shape).numel:
            return value.term
        term = self.of("expand", keyed(value), str(shape))
        self.expanded[term] = value
        return term

    def term(self, value: Number) -> int:
        return value.term if isinstance(value, Sized) else self.of("number", float(value).hex())


def joined(values: Sequence[Sized]) -> tuple[Dim, ...]:
    """The shape of what is made of these, one number of each."""
    found = values[0]
    for other in values[1:]:
        how, back = lies(other, found), lies(found, other)
        if isinstance(how, str):
            continue
        if isinstance(back, str):
            found = other
        elif lies(other, Sized(ZERO, (found.numel, other.last))) == "row" and found.last == 1:
            found = Sized(ZERO, (*found.shape[:-1], other.last))
        elif lies(found, Sized(ZERO, (other.numel, found.last))) == "row" and other.last == 1:
            found = Sized(ZERO, (*other.shape[:-1], found.last))
        else:
            found = Sized(ZERO, broadcast(found.shape, other.shape))
    return found.shape


def broadcast(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape that torch gives to what is made of two."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def lies(value: Sized, result: Sized) -> str | tuple[str, str, str]:
    """How a value lies in a result: as it is, one number a row, one a column, one for all, or by its shape."""
    if (value.numel, value.last) == (result.numel, result.last) or value.shape == result.shape:
        return "same"
    if value.numel == 1:
        return "scalar"
    if value.numel == value.last == result.last:
        return "row"
    if value.last == 1 and value.numel * result.last == result.numel:
        return "column"
    if value.numel == result.numel:
        return "same"
    return "as", str(value.shape), str(result.shape)


def _member(value: Number, result: Sized) -> Hashable:
    """An argument of a step: the term, and how it lies in the result."""
    return (value.term, lies(value, result)) if isinstance(value, Sized) else ("number", float(value).hex())


def shape_of(value: Value) -> tuple[Dim, ...]:
    return value.type.shape if isinstance(value.type, TensorType) else ()


def keyed(value: Sized) -> Hashable:
    return "value", value.term, str(value.shape)
