"""Paths from a graph's whole number back to the input that it was made of, with steps that can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from zgraph.ir import DType, Graph, Node, ScalarType, TensorType
from zgraph.ir.external_ops import facts
from zgraph.ir.graph import Arg, Value
from zgraph.ir.symbols import Dim, evaluate

MAX_PATHS = 64
"""Paths of a value that are followed."""

_INTEGERS = frozenset(
    {DType.i8, DType.i16, DType.i32, DType.i64, DType.u8, DType.u16, DType.u32, DType.u64, DType.bool}
)


@dataclass(frozen=True)
class Interval:
    """Whole numbers from `low` to `high`, both included; None where there is no end."""

    low: int | None
    high: int | None

    @property
    def only(self) -> int | None:
        """The number, where it is one alone."""
        return self.low if self.low == self.high else None


Step = Callable[[Interval], Interval]
"""From what the result of an op may be to what its operand may be."""


@dataclass(frozen=True)
class Path:
    """How a value comes from an input.

    Args:
        root: the input.
        steps: what was done to it, from the input on.
        replaced: numbers of the input in whose place something else is read.
    """

    root: str
    steps: tuple[Step, ...] = ()
    replaced: frozenset[int] = frozenset()

    def then(self, step: Step) -> Path:
        return replace(self, steps=(*self.steps, step))

    def undo(self, wanted: Interval) -> Interval:
        """Interval in which the input must be for the value to be in `wanted`."""
        for step in reversed(self.steps):
            wanted = step(wanted)
        return wanted


class Known:
    """Sizes and constants as numbers, where they are known.

    Args:
        sizes: a number for each symbolic size.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.ranges: dict[str, tuple[int, int]] = {}

    def number(self, dim: Dim) -> int | None:
        if isinstance(dim, int):
            return dim
        if any(str(s) not in self.sizes for s in dim.free_symbols):
            return None
        return evaluate(dim, self.sizes)

    def arg(self, arg: Arg) -> int | None:
        """A constant, or a size that is an operand."""
        if isinstance(arg, Value) and isinstance(arg.type, ScalarType):
            return None if arg.type.expr is None else self.number(arg.type.expr)
        if isinstance(arg, float):
            return int(arg) if arg.is_integer() else None
        return arg if isinstance(arg, int) and not isinstance(arg, bool) else None

    def range(self, arg: Arg) -> tuple[int, int] | None:
        """The least and the largest that an argument is, whatever the inputs are."""
        if isinstance(arg, Value) and arg.name in self.ranges:
            return self.ranges[arg.name]
        number = self.arg(arg)
        return None if number is None else (number, number)

    def follow(self, node: Node) -> None:
        """Take note of what a node makes of no input."""
        found: tuple[int, int] | None = None
        match node.op, node.args:
            case "aten.arange.default", (end,):
                found = self._counted(0, end)
            case (("aten.arange.start" | "aten.arange.start_step"), (start, end, *rest)) if rest in ([], [1]):
                found = self._counted(start, end)
            case (("aten.full.default" | "aten.full_like.default"), (_, number, *_)):
                found = self.range(number)
            case "aten.scalar_tensor.default", (number, *_):
                found = self.range(number)
            case (("aten.zeros.default" | "aten.zeros_like.default"), _):
                found = 0, 0
            case (("aten.ones.default" | "aten.ones_like.default"), _):
                found = 1, 1
            case op, (Value() as source, *_) if facts(op).keeps_elements or facts(op).elements == "chosen":
                found = self.ranges.get(source.name)
        if found is not None:
            self.ranges.update((r.name, found) for r in node.results)

    def _counted(self, start: Arg, end: Arg) -> tuple[int, int] | None:
        first, last = self.arg(start), self.arg(end)
        return None if first is None or last is None or last <= first else (first, last - 1)


@dataclass(frozen=True)
class Mask:
    """Where each element of a value is, or is not, made of one number of an input."""

    source: str
    number: int
    is_equal: bool


class Paths:
    """The paths of values, found as nodes are followed in order."""

    def __init__(self, graph: Graph, known: Known) -> None:
        self.known = known
        self.paths: dict[str, tuple[Path, ...]] = {
            i.value.name: (Path(i.value.name),)
            for i in graph.inputs
            if isinstance(i.value.type, TensorType) and i.value.type.dtype in _INTEGERS
        }
        self.masks: dict[str, Mask] = {}
        self.elements: dict[str, str] = {}

    def of(self, arg: Arg) -> tuple[Path, ...]:
        return self.paths.get(arg.name, ()) if isinstance(arg, Value) else ()

    def follow(self, node: Node) -> None:
        """Take note of what a node makes."""
        self.known.follow(node)
        if (mask := self._mask(node)) is not None:
            self.masks[node.name] = mask
        if facts(node.op).keeps_elements and isinstance(node.args[0], Value):
            self.elements[node.name] = self._elements(node.args[0])
        if found := tuple(islice(dict.fromkeys(self._made(node)), MAX_PATHS)):
            self.paths.update((r.name, found) for r in node.results if _is_whole(r))

    def _made(self, node: Node) -> Iterator[Path]:
        match facts(node.op).elements, node.args:
            case "joined", (tuple(parts), *_):
                for part in parts:
                    yield from self.of(part)
            case "source", (_, source, *_):
                yield from self.of(source)
            case "either", (condition, one, other, *_):
                yield from self._hidden(condition, one, is_read=True)
                yield from self._hidden(condition, other, is_read=False)
            case "filled", (source, condition, number, *_):
                yield from self._hidden(condition, source, is_read=False)
                yield from self.of(number)
            case str(), (source, *_):
                yield from self.of(source)
            case None, _ if (found := _arithmetic(node, self.known)) is not None:
                source, step = found
                yield from (path.then(step) for path in self.of(source))

    def _elements(self, value: Value) -> str:
        """The first value that had the same elements in the same order."""
        return self.elements.get(value.name, value.name)

    def _hidden(self, condition: Arg, source: Arg, *, is_read: bool) -> Iterator[Path]:
        """The paths of a value that is read where a condition holds, or where it does not."""
        mask = self.masks.get(condition.name) if isinstance(condition, Value) else None
        if mask is None or not isinstance(source, Value) or mask.is_equal == is_read:
            yield from self.of(source)
        else:
            hides = mask.source == self._elements(source)
            for path in self.of(source):
                yield replace(path, replaced=path.replaced | {mask.number}) if hides else path

    def _mask(self, node: Node) -> Mask | None:
        match node.op, node.args:
            case (("aten.eq.Scalar" | "aten.ne.Scalar"), (Value() as source, other)):
                number, paths = self.known.arg(other), self.of(source)
                if number is not None and len(paths) == 1:
                    there = paths[0].undo(Interval(number, number)).only
                    if there is not None:
                        return Mask(self._elements(source), there, node.op == "aten.eq.Scalar")
            case "aten.logical_not.default", (Value() as source,) if source.name in self.masks:
                mask = self.masks[source.name]
                return replace(mask, is_equal=not mask.is_equal)
            case op, (Value() as source, *_) if facts(op).keeps_elements:
                return self.masks.get(source.name)
        return None


def _is_whole(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype in _INTEGERS


# --- arithmetic, undone ------------------------------------------------------------------------------------------


def _arithmetic(node: Node, known: Known) -> tuple[Arg, Step] | None:
    """The operand that a result is made of with constants, and how to undo that."""
    name, args = node.op.removeprefix("aten.").partition(".")[0], node.args
    alpha = known.arg(node.option("alpha")) if node.option("alpha") is not None else 1
    if name in ("add", "sub", "rsub", "mul") and len(args) > 1 and alpha == 1:
        return _linear(name, args[0], args[1], known)
    if name == "neg":
        return args[0], scaled(-1)
    if name in ("clamp", "clamp_min", "clamp_max"):
        low, high = (*args[1:], None, None)[:2] if name != "clamp_max" else (None, args[1])
        return args[0], clamped(known.arg(low), known.arg(high))
    if name in ("remainder", "fmod") and (number := known.arg(args[1])) is not None and number > 0:
        return args[0], wrapped(number)
    floors = name == "floor_divide" or (name == "div" and node.option("rounding_mode") == "floor")
    if floors and (number := known.arg(args[1])) is not None and number > 0:
        return args[0], divided(number)
    return None


def _linear(name: str, one: Arg, other: Arg, known: Known) -> tuple[Arg, Step] | None:
    is_first = known.range(other) is not None
    source, constant = (one, other) if is_first else (other, one)
    if (found := known.range(constant)) is None or known.range(source) is not None:
        return None
    if name == "mul":
        return (source, scaled(found[0])) if found[0] == found[1] != 0 else None
    if name == "add":
        return source, shifted(*found)
    if (name == "sub") == is_first:
        return source, shifted(-found[1], -found[0])
    return source, lambda wanted: scaled(-1)(shifted(*found)(wanted))


def shifted(low: int, high: int) -> Step:
    """Interval adding something from `low` to `high`."""

    def undo(wanted: Interval) -> Interval:
        return Interval(
            None if wanted.low is None else wanted.low - low, None if wanted.high is None else wanted.high - high
        )

    return undo


def scaled(factor: int) -> Step:
    """Interval multiplying by a number other than 0."""

    def undo(wanted: Interval) -> Interval:
        low, high = (wanted.low, wanted.high) if factor > 0 else (wanted.high, wanted.low)
        return Interval(None if low is None else -(-low // factor), None if high is None else high // factor)

    return undo


def divided(number: int) -> Step:
    """Interval dividing by a number above 0, rounding down."""

    def undo(wanted: Interval) -> Interval:
        high = None if wanted.high is None else wanted.high * number + number - 1
        return Interval(None if wanted.low is None else wanted.low * number, high)

    return undo


def wrapped(number: int) -> Step:
    """Interval a remainder: numbers beyond the divisor too, where every remainder may be."""

    def undo(wanted: Interval) -> Interval:
        low = 0 if wanted.low is None else max(wanted.low, 0)
        high = number - 1 if wanted.high is None else min(wanted.high, number - 1)
        return Interval(0, 2 * number - 1) if (low, high) == (0, number - 1) else Interval(low, high)

    return undo


def clamped(least: int | None, most: int | None) -> Step:
    """Interval clamping: numbers beyond an end too, where that end may be."""

    def undo(wanted: Interval) -> Interval:
        low, high = wanted.low, wanted.high
        if least is not None and (low is None or least >= low):
            low = least - 2
        if most is not None and (high is None or most <= high):
            high = most + 2
        return Interval(low, high)

    return undo
