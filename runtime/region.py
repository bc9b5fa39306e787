"""Runs of ops between collectives that are run as one.

A region is a run of ops of one layer with nothing in between that moves data between ranks or to the host. It is known
by its text, in which values are numbered as they come: repeated layers have regions of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zgraph.ir import HIGHER_ORDER, Arg, Graph, Instruction, Node, Program, Value

Compute = Callable[[list[Any]], Sequence[Any]]
"""Function that runs a region: from a list of arguments, which may be emptied, to results."""

MIN_OPS = 2
"""Ops that are no views; a region with fewer has nothing to fuse."""


@dataclass(frozen=True)
class Region:
    """Instructions that are run as one.

    Args:
        nodes: what they compute.
        inputs: what they read, in the order in which they read it first.
        outputs: what they make that is read afterwards.
        frees: values made before that nothing reads afterwards.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    frees: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """Text of the region's computation: the same for all regions that compute the same."""
        numbers = {v.name: i for i, v in enumerate(self.inputs)}
        lines = [", ".join(str(v.type) for v in self.inputs)]
        for node in self.nodes:
            args = [*(_text(a, numbers) for a in node.args), *(f"{k}={_text(a, numbers)}" for k, a in node.kwargs)]
            for result in node.results:
                numbers[result.name] = len(numbers)
            lines.append(f"{node.op}({', '.join(args)}) -> {', '.join(str(r.type) for r in node.results)}")
        return "\n".join([*lines, ", ".join(str(numbers[v.name]) for v in self.outputs)])


def region_of(run: Sequence[Instruction]) -> Region:
    """The region that a run of instructions is; releases are among its frees."""
    nodes = tuple(i.node for i in run if i.node.op != "release")
    made = {r.name: r for n in nodes for r in n.results}
    freed = dict.fromkeys(name for i in run for name in i.frees)
    inputs = {v.name: v for n in nodes for v in n.operands if v.name not in made}
    outputs = tuple(v for name, v in made.items() if name not in freed)
    return Region(nodes, tuple(inputs.values()), outputs, tuple(name for name in freed if name not in made))


def _text(arg: Arg, numbers: dict[str, int]) -> str:
    if isinstance(arg, Value):
        return f"%{numbers[arg.name]}"
    return f"[{', '.join(_text(a, numbers) for a in arg)}]" if isinstance(arg, tuple) else repr(arg)


def cut(program: Program, graph: Graph) -> Iterator[Instruction | Region]:
    """The program's instructions, with regions in the place of those that they hold.

    Copies into new memory, which a gradient may be handed out in, do not end a region: they come after it.
    """
    run, copies = list[Instruction](), list[Instruction]()
    layer = ""
    for instruction in program.instructions:
        node = instruction.node
        touched = {*(v.name for v in node.operands), *instruction.frees}
        if copies and any(v.name in touched for copy in copies for v in (*copy.node.operands, *copy.node.results)):
            yield from _ended(run, copies, graph)
        if node.op == "copy" and run:
            copies.append(instruction)
            continue
        if not _is_computing(node, graph) or (node.origin.module and node.origin.layer != layer):
            yield from _ended(run, copies, graph)
        layer = node.origin.layer if node.origin.module else layer
        if _is_computing(node, graph):
            run.append(instruction)
        else:
            yield instruction
    yield from _ended(run, copies, graph)


def _is_computing(node: Node, graph: Graph) -> bool:
    row = graph.foreign.get(node.op)
    if row is None:
        return node.op in ("cast", "release")
    return row.is_pure and not node.op.startswith(f"{HIGHER_ORDER}.")


def _ended(run: list[Instruction], copies: list[Instruction], graph: Graph) -> Iterator[Instruction | Region]:
    """A run as a region, if it is worth one, and the copies after it; both lists are empty then."""
    ops = [i.node for i in run if i.node.op != "release"]
    if sum(not (n.op in graph.foreign and graph.foreign[n.op].views) for n in ops) < MIN_OPS:
        yield from run
    else:
        yield region_of(run)
    yield from copies
    run.clear()
    copies.clear()
