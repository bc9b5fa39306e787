"""Texts that ranks compare before they run: settings, a plan's programs, and the data that each collective moves.

A collective is described by what it moves, not by its name: the parameters that feed it, in the order of a bucket's
members, and the gradients that follow from it. So plans that ranks compile alone (another sequence length) can be told
to be the same over the wire, and two that move other data of the same size cannot be mistaken for each other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch

from zgraph.environment import environment
from zgraph.ir import Graph, Node, Phase, Plan, Program, Value
from zgraph.ir.ops import OPS
from zgraph.ir.printer import fingerprint, print_graph, print_node
from zgraph.ir.ranked_rows import ROUNDS
from zgraph.version import __version__

COLLECTIVES = frozenset(op.name for op in OPS.values() if op.lane == "comm" or op.name in ROUNDS)
_MARK_BYTES = 8


def settings_lines(pipeline: str) -> list[str]:
    """Settings that must be the same on all ranks, beside the model and the options; a line each."""
    return [
        f"zgraph {__version__}, torch {torch.__version__}",
        f"ZGRAPH_DISABLE={','.join(sorted(environment().disable))}",
        f"ZGRAPH_ARENAS={environment().arenas}",
        f"passes {pipeline}",
    ]


def check_joined(names: Mapping[str, str] = os.environ) -> str:
    """The problem where a launcher has started several ranks and none has joined a process group; else empty."""
    count = names.get("WORLD_SIZE", "1")
    if not count.isdigit() or int(count) < 2 or "RANK" not in names:
        return ""
    return (
        f"a launcher started this as rank {names['RANK']} of {count}, and there is no process group: each rank would "
        "train a model of its own. Call zgraph.init_distributed() first, or unset WORLD_SIZE to train on one rank"
    )


def described(node: Node) -> str:
    """A node for whoever waits for it: its name, its op, and when it runs."""
    return f"%{node.name} ({node.op}, {node.phase.name})"


def plan_text(plan: Plan, captured: str, known: str) -> str:
    """All that must be equal on all ranks to run a plan: what passes knew, were given and made, and the programs."""
    lines = [known, *captured.splitlines()[1:], f"final graph {fingerprint(_unnamed(plan.graph))}"]
    lines += print_graph(_unnamed(plan.graph), origins=False).splitlines()
    for program in programs(plan):
        lines += [f"program {program.name} {_digest(''.join(_program_lines(program))).hex()}", *_program_lines(program)]
    return "\n".join(lines)


def _unnamed(graph: Graph) -> Graph:
    """The graph without its name, which counts what this rank has compiled."""
    return replace(graph, name="")


def programs(plan: Plan) -> Iterator[Program]:
    """The programs of a plan: forward, backward, unsynced, and those without zero tangents."""
    return (p for p in (plan.forward, plan.backward, plan.unsynced, *(plan.loss_only or ())) if p is not None)


def _program_lines(program: Program) -> Iterator[str]:
    yield f"takes {', '.join(f'%{v.name}' for v in program.arguments)}"
    for instruction in program.instructions:
        frees = f" frees {', '.join(instruction.frees)}" if instruction.frees else ""
        yield f"{print_node(instruction.node, origins=False)}{frees}"
    yield f"returns {', '.join('none' if v is None else f'%{v.name}' for v in program.results)}"


def wire_of(plan: Plan) -> tuple[dict[int, bytes], tuple[object, ...]]:
    """Marks of a plan's collectives: one for each by the id of its node, and all marks of each program."""
    marks: dict[int, bytes] = {}
    found: list[tuple[bytes, ...]] = []
    loss_only = plan.loss_only or (plan.backward, plan.unsynced)
    for program in (plan.forward, plan.backward, plan.unsynced, *loss_only):
        if program is not None:
            moved = _Moved(plan, program)
            own = {id(n): moved.mark(n) for n in moved.nodes if n.op in COLLECTIVES}
            marks |= own
            found.append(tuple(own.values()))
    return marks, (plan.backward is not None, *found)


class _Moved:
    """Describes the data that the collectives of one program of a plan move."""

    def __init__(self, plan: Plan, program: Program) -> None:
        self.plan = plan
        self.nodes = [i.node for i in program.instructions if i.node.op != "release"]
        self.inputs = {i.value.name: f"{i.kind.value} {i.target}" for i in plan.graph.inputs if i.target}
        self.makers = {r.name: (n, i) for n in chain(plan.graph.nodes, self.nodes) for i, r in enumerate(n.results)}
        self.results: dict[str, list[str]] = {}
        is_forward = program is plan.forward
        outputs = [o for o in plan.graph.outputs if (o.phase is Phase.forward) == is_forward]
        targets = {i.value.name: i.target for i in plan.graph.inputs}  # names of values depend on what else is captured
        for output, value in zip(outputs, program.results, strict=False):
            if value is not None:
                word = f"{output.kind.value} {targets.get(output.target, '')}"
                self.results.setdefault(value.name, []).append(word)
        self._from: dict[str, str] = {}
        self._to: dict[str, str] = {}

    def mark(self, node: Node) -> bytes:
        """A hash of what a collective moves."""
        words = [node.op, node.phase.value, f"keep={node.option('keep')}"]
        words += [f"{_placed(v)} {self.source(v.name)}" for v in node.operands]
        if node.op != "all_gather_start":
            words += [self.follows(r.name) for r in node.results]
        return _digest("\n".join(words))

    def source(self, name: str) -> str:
        """Which parameters a value is made of, as far as it is moved and packed, not computed."""
        if name not in self._from:
            node, index = self.makers.get(name, (None, 0))
            if name in self.inputs:
                text = self.inputs[name]
            elif node is not None and node.op in OPS:
                text = f"{node.op}.{index}({', '.join(self.source(v.name) for v in node.operands)})"
            else:
                text = "computed"
            self._from[name] = _short(text)
        return self._from[name]

    @cached_property
    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, value in enumerate(node.operands):
                found.setdefault(value.name, []).append((node, position))
        return found

    def follows(self, name: str) -> str:
        """Which gradients and new buffers a value becomes, and as which member of a bucket."""
        if name not in self._to:
            words = list(self.results.get(name, ()))
            for node, position in self.readers.get(name, ()):
                if node.op in OPS:
                    after = ", ".join(self.follows(r.name) for r in node.results)
                    words.append(f"{node.op}.{position} {node.option('target')} ({after})")
                else:
                    words += self._reached(node)
            self._to[name] = _short("; ".join(sorted(set(words))))
        return self._to[name]

    def _reached(self, node: Node) -> set[str]:
        """The results of the program that depend on a node."""
        reached: set[str] = set()
        seen, todo = {id(node)}, [node]
        while todo:
            for result in todo.pop().results:
                reached.update(self.results.get(result.name, ()))
                for reader, _ in self.readers.get(result.name, ()):
                    if id(reader) not in seen:
                        seen.add(id(reader))
                        todo.append(reader)
        return reached


def _placed(value: Value) -> str:
    """The dtype, shape and placement of a value that a collective moves; a partial placement names its reduction."""
    kind = value.tensor
    return f"{kind.dtype.value}{list(kind.shape)}<{', '.join(map(str, kind.placement))}>"


def _short(text: str) -> str:
    """A text that does not grow with the length of what it was made of."""
    return text if len(text) <= 200 else _digest(text).hex()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_MARK_BYTES).digest()
