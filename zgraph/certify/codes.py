"""Rests that codes leave out: each is sent once, with the next gradients of the parameters that are named.

That codes stand for what was reduced is an axiom of `zgraph.certify.terms`: decode(exchange(encode(x))) is the
reduction of x, if all three are of one codec, whatever that rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

from zgraph.ir import Graph, Node, OutputKind
from zgraph.ir.graph import Value
from zgraph.ir.verifier import Fault

_ON_THE_WAY = frozenset(
    {
        "all_to_all_start",
        "all_gather_start",
        "outer_all_to_all_start",
        "outer_all_gather_start",
        "wait",
        "decode",
        "encode",
    }
)
_BEHIND = frozenset({"cast", "copy", "reshard", "wait", "offload_start"})


def feedback(graph: Graph) -> Iterator[Fault]:
    """Encodes whose feedback is not that of the parameters whose gradients they code, or that change a copy twice."""
    seen: dict[tuple[str, bool], str] = {}
    changed: dict[str, str] = {}
    for position, node in enumerate(graph.nodes):
        copies = node.option("copies")
        for name in map(str, copies if node.op == "encode" and isinstance(copies, tuple) else ()):
            if (before := changed.setdefault(name, node.name)) != node.name:
                yield position, f"changes the copy of {name}, which %{before} changes, too"
        names = node.option("feedback")
        if node.op != "encode" or not isinstance(names, tuple):
            continue
        for name in map(str, names):
            before = seen.setdefault((name, node.operands[0].tensor.reduction is None), node.name)
            if before != node.name:
                yield position, f"adds what the codes of {name} left out, which %{before} adds, too"
        found = [_parameters(graph, value) for value in _numbers(graph, node)]
        if found != [{str(name)} for name in names]:
            coded = ", ".join(" and ".join(sorted(each)) or "nothing" for each in found)
            yield position, f"keeps what it leaves out for {', '.join(map(str, names))}, but codes gradients of {coded}"


def _numbers(graph: Graph, node: Node) -> list[Value]:
    """The numbers that a code ends as, those of a bucket taken apart."""
    while node.op in _ON_THE_WAY:
        users = [p for p in graph.users.get(node.results[0].name, ()) if graph.nodes[p].op != "release"]
        last = node
        if len(users) != 1:
            return list(last.results)
        node = graph.nodes[users[0]]
        if node.op not in _ON_THE_WAY and node.op != "unpack":
            return list(last.results)
    return list(node.results)


def _parameters(graph: Graph, value: Value) -> set[str]:
    """The parameters whose gradient a value becomes."""
    names = {i.value.name: i.target for i in graph.params}
    found = {
        names.get(o.target, o.target)
        for o in graph.outputs
        if o.value is not None and o.value.name == value.name and o.kind is OutputKind.grad
    }
    for position in graph.users.get(value.name, ()):
        user = graph.nodes[position]
        if user.op in _BEHIND:
            found |= _parameters(graph, user.results[[v.name for v in user.operands].index(value.name)])
    return found
