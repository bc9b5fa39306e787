"""Stretches of a program that a GPU can repeat by itself: what lies between two parts that the host has to begin.

    %a = mm(..); %b = relu(..); %f = all_gather_start(..); %c = mm(..); %d = mul(..); %w = wait(%f); ..
    \\-- one stretch ---------/                             \\-- another ------------/

A collective is begun by the host, which watches over it, and so is a copy to the host's memory. A recording has its
addresses and its sizes for good. It may write to what is given to a program only where that memory stays, as a cache of
keys and values does: elsewhere it has a copy of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from zgraph.ir import HIGHER_ORDER, OPS, Graph, Instruction, Node, NoneType, TensorType, Value
from zgraph.ir.aliases import Memory
from zgraph.runtime.region import Region

Part = Instruction | Region

MIN_OPS = 4
"""Ops that are no views; a replay and its copies take the host as long as two or three launches."""

ANY_TENSORS = ("amax", "cast", "copy", "float8_cast", "float8_scale", "pack", "unpack")
"""Ops of zgraph that only compute, on the device."""

REASONS = {
    "comm": "collectives, which the host begins and watches over",
    "d2h": "copies to and from the host",
    "h2d": "copies to and from the host",
    "wait": "waits for what was begun",
    "accumulate": "sums with gradients that the model keeps",
}
"""Why parts are left to the host, by their op or its lane."""


@dataclass(frozen=True)
class Stretch:
    """Parts of a program that are recorded as one.

    Args:
        parts: instructions, and regions that run as one, in their order.
        inputs: what they read that is not there for good, in the order in which they read it first.
        outputs: what they make that is read afterwards.
        frees: values made before that nothing reads afterwards.
        num_ops: ops that are no views.
    """

    parts: tuple[Part, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    frees: tuple[str, ...]
    num_ops: int

    @property
    def reads(self) -> Iterator[Value]:
        """All that the parts read, parameters included."""
        return (value for part in self.parts for value in reads_of(part))

    @property
    def name(self) -> str:
        """The first and the last node."""
        return f"{_nodes(self.parts[0])[0].name} to %{_nodes(self.parts[-1])[-1].name}"


def cut(
    parts: Iterable[Part],
    graph: Graph,
    resident: frozenset[str],
    left: Counter[str],
    caches: frozenset[str] = frozenset(),
) -> Iterator[Part | Stretch]:
    """The parts of a program, with stretches in the place of those that they hold.

    Args:
        parts: of the program.
        graph: that it is of.
        resident: names of values whose memory stays: parameters and constants.
        left: counts, by the reason, the ops that are left to the host.
        caches: names of inputs whose memory stays too, and is written to.
    """
    run: list[Part] = []
    written = _written_in(graph, caches) if caches else frozenset[str]()
    for part in parts:
        problem = next(filter(None, (problem_of(node, graph, written) for node in _nodes(part))), "")
        if not problem:
            run.append(part)
            continue
        yield from _ended(run, graph, resident, left)
        left[problem] += sum(_is_op(node, graph) for node in _nodes(part))
        yield part
    yield from _ended(run, graph, resident, left)


def _written_in(graph: Graph, caches: frozenset[str]) -> frozenset[str]:
    """Names of values that are in these caches, and in nothing else."""
    memory = Memory(graph)
    names = (*caches, *(result.name for node in graph.nodes for result in node.results))
    return frozenset(name for name in names if memory.roots(name) <= caches)


def problem_of(node: Node, graph: Graph, written: frozenset[str] = frozenset()) -> str:
    """Why a node cannot be part of a recording; empty if it can.

    Args:
        node: of the graph.
        graph: that it is of.
        written: names of values that a recording may write to.
    """
    if node.op == "release":
        return ""
    if node.op in OPS:
        row = OPS[node.op]
        if node.op not in ANY_TENSORS:
            return REASONS.get(node.op) or REASONS.get(row.lane) or f"{node.op}, which has a state"
    else:
        facts = graph.foreign[node.op]
        if facts.opaque:
            return "ops whose effects are unknown"
        if not all(isinstance(a := node.args[i], Value) and a.name in written for i in facts.writes):
            return "ops that write to what they are given"
        if node.op.startswith(f"{HIGHER_ORDER}."):
            return "ops that call functions"
    kinds = [value.type for value in (*node.operands, *node.results)]
    if not all(isinstance(kind, TensorType | NoneType) for kind in kinds):
        return "numbers that the host computes"
    tensors = [kind for kind in kinds if isinstance(kind, TensorType)]
    if any(kind.is_on_host for kind in tensors):
        return "values in the host's memory"
    if not all(isinstance(size, int) for kind in tensors for size in (*kind.shape, *(kind.strides or ()))):
        return "sizes that change from call to call"
    return ""


def _nodes(part: Part) -> Sequence[Node]:
    return part.nodes if isinstance(part, Region) else (part.node,)


def reads_of(part: Part) -> Sequence[Value]:
    """The values that a part reads."""
    return part.inputs if isinstance(part, Region) else part.node.operands


def _makes(part: Part) -> Sequence[Value]:
    return part.outputs if isinstance(part, Region) else part.node.results


def _is_op(node: Node, graph: Graph) -> bool:
    return node.op != "release" and not (node.op in graph.foreign and graph.foreign[node.op].views)


def _ended(run: list[Part], graph: Graph, resident: frozenset[str], left: Counter[str]) -> Iterator[Part | Stretch]:
    """A run as a stretch, if it is worth one; the list is empty then."""
    num_ops = sum(_is_op(node, graph) for part in run for node in _nodes(part))
    made = {value.name: value for part in run for value in _makes(part)}
    freed = dict.fromkeys(name for part in run for name in part.frees)
    outputs = tuple(value for name, value in made.items() if name not in freed)
    if num_ops < MIN_OPS or not outputs:
        if num_ops:
            left["too few between two of these"] += num_ops
        yield from run
    else:
        read = {value.name: value for part in run for value in reads_of(part)}
        inputs = tuple(value for name, value in read.items() if name not in made and name not in resident)
        frees = tuple(name for name in freed if name not in made)
        yield Stretch(tuple(run), inputs, outputs, frees, num_ops)
    run.clear()
