"""Repeated blocks of a graph: each node of a repetition stands for those at its place in the others.

A model's layers are the same run of ops, one after the other. Such runs are found in the order of the nodes, in the
forward and in the backward: op by op, with the types of results and all arguments that are no values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from zgraph.ir import Graph, Node, OutputKind, Phase, Value
from zgraph.ir.graph import Arg

FEW_MATRICES = 8
"""A graph with no more matrices among its parameters is searched as a whole: blocks that look alike may differ then."""

PERIOD_MATRICES = 4
"""Matrices that a repetition reads at least: of two linear layers in a row, one is best cut by rows and the other by
columns."""

_NUM_PERIODS = 12
"""Distances that are tried, the most frequent between two nodes that look alike."""


def twins(graph: Graph) -> tuple[int, ...]:
    """For each node, the position of the node that stands for it: its own if no repetition has it."""
    found = list(range(len(graph.nodes)))
    if sum(_is_matrix(entry.value) for entry in graph.params) <= FEW_MATRICES:
        return tuple(found)
    kinds: dict[object, int] = {}
    looks = np.array([kinds.setdefault(_look(node), len(kinds)) for node in graph.nodes])
    counted = _matrices(graph)
    reads = np.cumsum([0, *(len(counted & {v.name for v in (*n.operands, *n.results)}) for n in graph.nodes)])
    for phase in Phase:
        places = [at for at, node in enumerate(graph.nodes) if node.phase is phase]
        if places:
            for begin, length, period in _repetitions(looks, reads, places[0], places[-1] + 1):
                found[begin : begin + length] = [begin + step % period for step in range(length)]
    return tuple(found)


def _repetitions(looks: np.ndarray, reads: np.ndarray, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The longest repetition in a part of the graph, and those in what is left of it: its begin, length and period."""
    part = looks[begin:end]
    best = max(_candidates(part, reads[begin : end + 1]), default=(0, 0, 0))
    length, period, at = best[0], -best[1], -best[2]
    if not length:
        return
    yield begin + at, length, period
    yield from _repetitions(looks, reads, begin, begin + at)
    yield from _repetitions(looks, reads, begin + at + length, end)


def _candidates(part: np.ndarray, reads: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Repetitions by several periods: nodes covered, the period and the begin, the latter two negated."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for at, look in enumerate(part.tolist()):
        if look in last:
            distances[at - last[look]] += 1
        last[look] = at
    for distance, _ in distances.most_common(_NUM_PERIODS):
        for period in (distance, 2 * distance, 4 * distance):
            if period >= len(part):
                break
            begin, length = _longest(part[:-period] == part[period:])
            if length < period or reads[begin + period] - reads[begin] < PERIOD_MATRICES:
                continue
            yield length + period, -period, -begin
            break


def _longest(alike: np.ndarray) -> tuple[int, int]:
    """The begin and the length of the longest run of truths."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], alike.astype(np.int8), [0]))))
    if not edges.size:
        return 0, 0
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(begins[longest]), int(lengths[longest])


def _look(node: Node) -> tuple[object, ...]:
    """All of a node but the names of what it reads and makes."""
    return (
        node.op,
        node.phase,
        tuple(v.type for v in node.results),
        _plain(node.args),
        tuple((key, _plain(arg)) for key, arg in node.kwargs),
    )


def _plain(arg: Arg) -> object:
    """An argument with types in the place of values."""
    if isinstance(arg, Value):
        return arg.type
    if isinstance(arg, tuple):
        return tuple(map(_plain, arg))
    return arg if isinstance(arg, int | float | str | bool | None) else str(arg)


def _matrices(graph: Graph) -> set[str]:
    """The names of matrices among the parameters, and of their gradients."""
    grads = (o.value for o in graph.outputs if o.kind is OutputKind.grad)
    return {v.name for v in (*(i.value for i in graph.params), *grads) if v is not None and _is_matrix(v)}


def _is_matrix(value: Value) -> bool:
    return len(value.tensor.shape) > 1


def instances(stands: Sequence[int]) -> dict[int, list[int]]:
    """Of each node that stands for others, the positions of all, in order."""
    found: dict[int, list[int]] = {}
    for position, at in enumerate(stands):
        found.setdefault(at, []).append(position)
    return found
