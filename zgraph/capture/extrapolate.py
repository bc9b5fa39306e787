"""The graph of a deep model from those of shallow ones, by the lines of their texts.

In the text of a captured graph each layer is the same lines, and all that differs are whole numbers: that of the layer
in paths, and those in the names of values, which torch counts op by op. They grow linearly from layer to layer and
with the number of layers:

    fwd %relu_4: ... = aten.relu.default(%addmm_4) @ "layers.4"          the fifth layer, whatever follows
    bwd %mul_9: ... = aten.mul.Tensor(%add_31, %primals_10) @ "layers.4" the same, where the model has nine

So each part of the text (inputs, forward, backward, what is returned) is lines before a layer, the layer, and lines
behind it. Its place and the growth of its numbers are read from graphs with one layer more, and with two. What was read
has to give back every graph that was captured, to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from zgraph.errors import CaptureError
from zgraph.ir import Graph, parse_graph, print_graph

Counts = tuple[int, ...]
"""For each stack of layers, how many more of them there are than in the smallest graph."""

Numbers = tuple[int, ...]

_NAME = re.compile(r"%(\w+)")
_FIRST = re.compile(r"%(\w+?)_0\b")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d*(?:e[+-]?\d+)?|e[+-]?\d+)|(?<!\d)(0|[1-9]\d*)(?!\d)")
"""A fraction, or a whole number, which is the group."""

_PARTS = {"op": "graph", "param": "input", "buffer": "input"}


def extrapolate(captured: Mapping[Counts, Graph], counts: Counts) -> Graph:
    """The graph of a model with more layers than any that was captured.

    Args:
        captured: the smallest graph, for each stack the graphs with one and with two more of its layers, and any others
            that are to be given back.
        counts: of the wanted graph.

    Raises:
        CaptureError: the graphs follow no such pattern; the message says where.
    """
    texts = {some: print_graph(graph) for some, graph in captured.items()}
    read = {some: _parts(text) for some, text in texts.items()}
    parts = [_part(name, read, len(counts)) for name in read[(0,) * len(counts)]]

    def text(wanted: Counts) -> str:
        return "".join(_FIRST.sub(r"%\1", line) + "\n" for part in parts for line in part.written(wanted))

    for some, expected in texts.items():
        if text(some) != expected:
            raise CaptureError(f"what was read from other numbers of layers is not what was captured of {some}")
    return parse_graph(text(counts))


@dataclass(frozen=True, slots=True)
class _NumberedLine:
    """A line as its whole numbers and the words around them. A name without a number has that of 0."""

    words: tuple[str, ...]
    numbers: Numbers

    @classmethod
    def read(cls, text: str) -> _NumberedLine:
        text = _NAME.sub(lambda name: name[0] if re.search(r"_\d+$", name[0]) else f"{name[0]}_0", text)
        found = [number for number in _NUMBER.finditer(text) if number[1]]
        ends = [0, *(number.end() for number in found)]
        begins = [*(number.start() for number in found), len(text)]
        words = tuple(text[end:begin] for end, begin in zip(ends, begins, strict=True))
        return cls(words, tuple(int(number[1]) for number in found))

    def written(self, growth: Numbers) -> str:
        """The line with its numbers extrapolated."""
        numbers = (str(n + more) for n, more in zip(self.numbers, growth, strict=True))
        return "".join(piece for pair in zip(self.words, (*numbers, ""), strict=True) for piece in pair)


@dataclass(frozen=True)
class _Stack:
    """Growth of a part of the text with one stack's layers.

    Args:
        begin, end: place of the layer in the smallest graph; nowhere if both are the same.
        with_count: growth of each line's numbers for one layer more in the stack.
        with_layer: growth of the numbers in the layer's lines from one layer to the next.
    """

    begin: int
    end: int
    with_count: tuple[Numbers, ...]
    with_layer: tuple[Numbers, ...]


@dataclass(frozen=True)
class _Part:
    """A part of the smallest graph's text, and how it grows with each stack."""

    lines: tuple[_NumberedLine, ...]
    stacks: tuple[_Stack, ...]

    def written(self, counts: Counts) -> Iterator[str]:
        """Its lines, with so many more layers."""
        repeated = {s.begin: (s, count) for s, count in zip(self.stacks, counts, strict=True) if s.begin < s.end}
        at = 0
        while at < len(self.lines):
            stack, count = repeated.get(at, (None, 0))
            end = stack.end if stack else at + 1
            for layer in range(count + 1):
                for number in range(at, end):
                    growth = self._growth(number, counts)
                    if stack:
                        growth = _plus(growth, stack.with_layer[number - at], layer)
                    yield self.lines[number].written(growth)
            at = end

    def _growth(self, number: int, counts: Counts) -> Numbers:
        growth = (0,) * len(self.lines[number].numbers)
        for stack, count in zip(self.stacks, counts, strict=True):
            growth = _plus(growth, stack.with_count[number], count)
        return growth


def _parts(text: str) -> dict[str, list[_NumberedLine]]:
    """The lines of a graph's text by what they are: its head, inputs, forward, and so on."""
    found: dict[str, list[_NumberedLine]] = {}
    for name, lines in groupby(text.splitlines(), _part_name):
        found.setdefault(name, []).extend(map(_NumberedLine.read, lines))
    return found


def _part_name(line: str) -> str:
    first, second, _ = f"{line}  ".split(" ", 2)
    return f"return {second}" if first == "return" else _PARTS.get(first, first)


def _part(name: str, read: Mapping[Counts, Mapping[str, Sequence[_NumberedLine]]], num_stacks: int) -> _Part:
    stacks: list[_Stack] = []
    for number in range(num_stacks):
        few, one, two = (
            read[tuple(more * (n == number) for n in range(num_stacks))].get(name, ()) for more in range(3)
        )
        if (stack := _stack(few, one, two, stacks)) is None:
            raise CaptureError(f"the layers do not repeat evenly in the lines of {name}")
        stacks.append(stack)
    return _Part(tuple(read[(0,) * num_stacks][name]), tuple(stacks))


def _stack(
    few: Sequence[_NumberedLine], one: Sequence[_NumberedLine], two: Sequence[_NumberedLine], others: Sequence[_Stack]
) -> _Stack | None:
    """Place of the layer and growth of numbers, from lines with none, one and two more layers; None if nowhere.

    Layers of several stacks may look the same: places of the others' layers are left out.
    """
    size = len(one) - len(few)
    if size < 0 or len(two) - len(one) != size:
        return None
    before = [_step(*lines) for lines in zip(few, one, two, strict=False)]
    behind = [_step(*lines) for lines in zip(few, one[size:], two[2 * size :], strict=True)]
    between = [_layer_step(number, size, one, two) for number in range(len(few))]
    for begin in range(len(few) - size + 1):
        end = begin + size
        if any(begin < other.end and other.begin < end for other in others):
            continue
        with_count, with_layer = _all_of([*before[:end], *behind[end:]]), _all_of(between[begin:end])
        if with_count is not None and with_layer is not None:
            return _Stack(begin, end, with_count, with_layer)
    return None


def _all_of(steps: Sequence[Numbers | None]) -> tuple[Numbers, ...] | None:
    found = tuple(step for step in steps if step is not None)
    return found if len(found) == len(steps) else None


def _layer_step(number: int, size: int, one: Sequence[_NumberedLine], two: Sequence[_NumberedLine]) -> Numbers | None:
    """How the numbers of a line grow to the same line of the next layer, and of the one after that."""
    step = _step(two[number], two[number + size], two[number + 2 * size])
    return step if step == _difference(one[number], one[number + size]) else None


def _step(first: _NumberedLine, second: _NumberedLine, third: _NumberedLine) -> Numbers | None:
    """Growth of a line's numbers, the same in both steps; None if it is not, or if the words of the lines differ."""
    step = _difference(first, second)
    return step if step == _difference(second, third) else None


def _difference(first: _NumberedLine, second: _NumberedLine) -> Numbers | None:
    return _plus(second.numbers, first.numbers, -1) if first.words == second.words else None


def _plus(numbers: Numbers, step: Numbers, times: int) -> Numbers:
    return tuple(n + times * more for n, more in zip(numbers, step, strict=True)) if times else numbers
