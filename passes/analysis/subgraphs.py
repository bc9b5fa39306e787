"""Subgraphs as text, found in a graph: calls joined by names.

A subgraph is `y = op(x, ...)` and more of those, the last one its root. Matching starts there and goes from a name to
the op that makes it; a name stands for the same wherever it is written. What lies inside may be read by nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from zgraph.ir import Arg, Graph, Node, TensorType, Value
from zgraph.ir.external_ops import facts
from zgraph.passes.analysis.rows import dims, written

Bound = Mapping[str, Arg]
"""The argument that each name of a subgraph is bound to."""

Wanted = str | tuple["Wanted", ...]
"""An argument as text: a name, a word, or several of them."""

_WORDS = frozenset({"_", "last", "half", "end", "true", "false", "none"})
_CALL = re.compile(r"(\w+) = ([\w.]+)\((.*)\)")
_ARG = re.compile(r"\[[^\]]*\]|[^\s,]+")


@dataclass(frozen=True)
class Call:
    """One op: the name of its result, what it is called and what with."""

    result: str
    op: str
    args: tuple[Wanted, ...]


@dataclass(frozen=True)
class Subgraph:
    """Calls in an order that runs; the last one is the root."""

    calls: tuple[Call, ...]

    @cached_property
    def makers(self) -> Mapping[str, Call]:
        return {call.result: call for call in self.calls}

    @property
    def root(self) -> Call:
        return self.calls[-1]


@dataclass(frozen=True)
class Found:
    """A subgraph of a graph: its nodes in their order, the root last, and what each name is bound to."""

    nodes: tuple[Node, ...]
    bound: Bound


def parse_calls(text: str) -> tuple[Call, ...]:
    """Calls parted by semicolons."""
    return tuple(map(_call, text.split("; ")))


def _call(text: str) -> Call:
    found = _CALL.fullmatch(text)
    assert found is not None, f"{text!r} is no call"
    return Call(found[1], found[2], _wanted(found[3]))


def _wanted(text: str) -> tuple[Wanted, ...]:
    return tuple(_wanted(arg[1:-1]) if arg.startswith("[") else arg for arg in _ARG.findall(text))


def find(subgraph: Subgraph, root: Node, graph: Graph, position: Mapping[str, int]) -> Found | None:
    """The subgraph that ends in a node, if nothing else reads what lies inside it.

    Args:
        subgraph: what to look for.
        root: where it has to end.
        graph: where to look.
        position: of each node, by its name.
    """
    for bound in _bind_call(subgraph, subgraph.root, root, {}, graph):
        inside = {v.name for name, v in bound.items() if name in subgraph.makers and isinstance(v, Value)}
        read = {v.name for name, v in bound.items() if name not in subgraph.makers and isinstance(v, Value)}
        nodes = sorted((graph.producers[name] for name in inside), key=lambda n: position[n.name])
        if inside.isdisjoint(read) and _is_closed(nodes, graph, position):
            return Found(tuple(nodes), bound)
    return None


def _is_closed(nodes: Sequence[Node], graph: Graph, position: Mapping[str, int]) -> bool:
    """Whether only the last of the nodes is read from outside, and all can run where it stands."""
    *inner, root = nodes
    inside = {position[n.name] for n in nodes}
    for node in inner:
        if node.name in graph.output_names or not inside.issuperset(graph.users.get(node.name, ())):
            return False
    if any((node.phase, node.checkpoint) != (root.phase, root.checkpoint) for node in inner):
        return False
    between = graph.nodes[min(inside) : max(inside)]
    return not any((row := graph.foreign.get(n.op)) and (row.writes or row.opaque) for n in between)


def _bind_call(subgraph: Subgraph, call: Call, node: Node, bound: Bound, graph: Graph) -> Iterator[Bound]:
    """All that names may stand for if a node is this call."""
    if node.op != call.op or len(node.results) != 1 or len(node.args) > len(call.args):
        return
    if node.kwargs and not facts(node.op).options_in_types:
        return
    args = (*node.args, *(None,) * (len(call.args) - len(node.args)))
    for given in (args, args[::-1]) if facts(call.op).commutes else (args,):
        yield from _bind_all(subgraph, call.args, given, node, {**bound, call.result: node.results[0]}, graph)


def _bind_all(
    subgraph: Subgraph, wanted: Sequence[Wanted], args: Sequence[Arg], node: Node, bound: Bound, graph: Graph
) -> Iterator[Bound]:
    """All that names may stand for if these are the arguments of a node."""
    if not wanted:
        yield bound
        return
    for more in _bind_one(subgraph, wanted[0], args[0], node, bound, graph):
        yield from _bind_all(subgraph, wanted[1:], args[1:], node, more, graph)


def _bind_one(subgraph: Subgraph, wanted: Wanted, arg: Arg, node: Node, bound: Bound, graph: Graph) -> Iterator[Bound]:
    if isinstance(wanted, tuple):
        if isinstance(arg, tuple) and len(arg) == len(wanted):
            yield from _bind_all(subgraph, wanted, arg, node, bound, graph)
    elif wanted in _WORDS or not wanted.isidentifier():
        if _is_word(wanted, arg, node):
            yield bound
    elif wanted in bound:
        if bound[wanted] == arg:
            yield bound
    elif wanted not in subgraph.makers:
        yield {**bound, wanted: arg}
    elif isinstance(arg, Value) and (maker := graph.producers.get(arg.name)) is not None:
        yield from _bind_call(subgraph, subgraph.makers[wanted], maker, bound, graph)


def _is_word(word: str, arg: Arg, node: Node) -> bool:
    """Whether an argument is what a word says; sizes are those of the longest rows that the node reads or makes."""
    kinds = [v.type for v in (*node.operands, *node.results) if isinstance(v.type, TensorType)]
    columns = max((d for k in kinds for d in k.shape[-1:] if isinstance(d, int)), default=None)
    match word:
        case "_":
            return True
        case "last":
            return dims(arg, max(len(k.shape) for k in kinds)) == "last"
        case "half":
            return isinstance(arg, int) and 2 * arg == columns
        case "end":
            return isinstance(arg, int) and columns is not None and arg >= columns
        case _:
            return written(arg) == word
