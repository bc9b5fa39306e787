"""How far whole numbers that a graph is given may go: those that choose rows of something, by what they choose from.

Each number is followed from where it chooses back to the input that it comes from, and what it may be there follows
from what was done on the way:

    fwd %p = aten.add.Tensor(%ids, 2)           %ids from -2 to 7
    fwd %e = aten.embedding.default(%w, %p)     %p from 0 to 9, where %w has ten rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from zgraph.debugging.paths import Interval, Known, Path, Paths
from zgraph.ir import Graph, Node, TensorType
from zgraph.ir.external_ops import facts
from zgraph.ir.graph import Arg, Value


@dataclass(frozen=True)
class Span:
    """Whole numbers from `low` to `high`, both included, and others beside them that whoever reads them leaves out."""

    low: int
    high: int
    beside: frozenset[int] = frozenset()

    def within(self, low: int, high: int) -> Span:
        """Those of a dtype that goes from `low` to `high`."""
        return Span(max(self.low, low), min(self.high, high), frozenset(n for n in self.beside if low <= n <= high))


def spans(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Span]:
    """For inputs that index something: the numbers that they may be. Inputs used in another way only are left out.

    Args:
        graph: whose inputs to look at.
        sizes: a number for each symbolic size; sizes that are not there are not known.
    """
    known = Known(sizes)
    paths = Paths(graph, known)
    wanted: dict[str, list[Span]] = {}
    for node in graph.nodes:
        for index, size, left_out in _indexed(node, known):
            for path in paths.of(index):
                if (span := _at_root(path, size, left_out)) is not None:
                    wanted.setdefault(path.root, []).append(span)
        paths.follow(node)
    return {name: span for name, each in wanted.items() if (span := _common(each)) is not None}


def _at_root(path: Path, size: int, left_out: int | None) -> Span | None:
    """Numbers that an input may have so that the index made of it is below a size; None where any will do."""
    found, beside = path.undo(Interval(0, size - 1)), path.replaced
    if left_out is not None and (there := path.undo(Interval(left_out, left_out)).only) is not None:
        beside |= {there}
    return None if found.low is None or found.high is None else Span(found.low, found.high, beside)


def _common(wanted: list[Span]) -> Span | None:
    """Numbers that all uses allow; None where there are none."""
    low, high = max(s.low for s in wanted), min(s.high for s in wanted)
    beside = {n for span in wanted for n in span.beside if not low <= n <= high}
    allowed = frozenset(n for n in beside if all(s.low <= n <= s.high or n in s.beside for s in wanted))
    return Span(low, high, allowed) if low <= high else None


def drawn(count: int, bound: int, turn: int, random: torch.Generator) -> torch.Tensor:
    """Numbers from 0 below a bound in any order: all of them where there are enough, else others at each turn."""
    numbers = (torch.arange(count) + turn * count) % bound
    return numbers[torch.randperm(count, generator=random)]


def drawn_from(span: Span, count: int, turn: int, random: torch.Generator) -> torch.Tensor:
    """Numbers of a span in any order, all of them if there is room; a few that are left out, but never all."""
    numbers = drawn(count, span.high - span.low + 1, turn, random) + span.low
    if span.beside and count > 1:
        others = torch.tensor(sorted(span.beside))
        spare = count - (span.high - span.low + 1)
        few = min(max(count // 8, 1), spare) if spare > 0 else min(max(count // 8, 1), count // 2)
        places = _spare_places(numbers, few)
        numbers[places] = others[(torch.arange(len(places)) + turn) % len(others)]
    return numbers


def _spare_places(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Places of numbers that come again elsewhere, or any where there are too few."""
    order = numbers.argsort(stable=True)
    again = order[1:][numbers[order][1:] == numbers[order][:-1]]
    places = torch.cat([again, torch.arange(len(numbers))])
    return torch.tensor(list(dict.fromkeys(places.tolist()))[:count], dtype=torch.long)


# --- what indexes ------------------------------------------------------------------------------------------------

_Use = tuple[Value, int, int | None]
"""Use of an index: the index, the size of the dimension it chooses from, and a number that is left out."""


def _indexed(node: Node, known: Known) -> Iterator[_Use]:
    match facts(node.op).indexing, node.args:
        case "rows", (Value() as rows, index, *_):
            yield from _sized(known, rows, 0, index)
        case "dim", (Value() as rows, int(dim), index, *_):
            yield from _sized(known, rows, dim, index)
        case "dims", (Value() as rows, tuple(indices), *_):
            for dim, index in enumerate(indices):
                yield from _sized(known, rows, dim, index)
        case "flat", (Value() as rows, Value() as index):
            if (size := known.number(rows.tensor.numel)) is not None:
                yield index, size, None
        case ("classes", (index, size, *_)) | ("class", (_, index, size, *_)):
            count = known.arg(size)
            if count is not None and count > 0 and isinstance(index, Value):
                yield index, count, None
        case "class of scores", (Value() as rows, index, _, _, int(left_out), *_):
            yield from _sized(known, rows, 1 if len(rows.tensor.shape) > 1 else 0, index, left_out)
        case "logits", (Value() as rows, index, int(left_out), *_):
            yield from _sized(known, rows, -1, index, left_out)
        case "projected", (_, Value() as rows, index, int(left_out), *_):
            yield from _sized(known, rows, 0, index, left_out)
        case "distilled", (_, Value() as rows, _, _, index, _, _, _, int(left_out)):
            yield from _sized(known, rows, 0, index, left_out)
        case "kept words", (_, Value() as rows, index, words, _, _, int(left_out)):
            yield from _sized(known, rows, 0, index, left_out)
            yield from _sized(known, rows, 0, words)


def _sized(known: Known, rows: Value, dim: int, index: Arg, left_out: int | None = None) -> Iterator[_Use]:
    shape = rows.type.shape if isinstance(rows.type, TensorType) else ()
    if isinstance(index, Value) and -len(shape) <= dim < len(shape):
        if size := known.number(shape[dim]):
            yield index, size, left_out
