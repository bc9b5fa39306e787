"""A graph as text (`.zir`): one op a line, deterministic, read back exactly by `zgraph.ir.parser`.

graph "joint" mesh(shard=2)
op aten.mm.default
param %w: f32[64, 32]<S0> "lin.weight" stage=3
input %x: f32[4, 64]<V>
fwd %w_start: future f32[64, 32]<R> = all_gather_start(%w) by all-gather
fwd %w_full: f32[64, 32]<R> = wait(%w_start) by all-gather
fwd %y: f32[4, 32]<V> = aten.mm.default(%x, %w_full) @ "lin" "model.py":12
return fwd output %y
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from zgraph.ir.graph import Arg, ExternalOp, Graph, Input, Node, Origin, Output, Phase, Token, Value
from zgraph.ir.types import DType


def print_graph(graph: Graph, *, origins: bool = True) -> str:
    """The whole graph as text. `origins=False` leaves out where nodes come from, which differs between machines."""
    mesh = ", ".join(f"{a.name}={a.size}" for a in graph.mesh)
    lines = [f"graph {json.dumps(graph.name)}" + (f" mesh({mesh})" if mesh else "")]
    lines += [print_arenas(graph.arenas)] if graph.arenas else []
    lines += [print_foreign(name, row) for name, row in sorted(graph.foreign.items())]
    lines += [_subgraph(sub, origins=origins) for sub in graph.subgraphs]
    lines += [print_input(i) for i in graph.inputs]
    lines += [print_node(n, origins=origins) for n in graph.nodes]
    lines += [print_output(o) for o in graph.outputs]
    return "\n".join(lines) + "\n"


def fingerprint(graph: Graph) -> str:
    """A hash of what the graph does: its text without origins."""
    return hashlib.sha256(print_graph(graph, origins=False).encode()).hexdigest()[:16]


def _subgraph(graph: Graph, *, origins: bool) -> str:
    """A function that a higher-order op calls: its text, indented, and an end."""
    lines = print_graph(graph, origins=origins).splitlines()
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:]), "end"])


def print_node(node: Node, *, origins: bool = True) -> str:
    """One node as its line."""
    results = ", ".join(f"%{r.name}: {r.type}" for r in node.results)
    args = [print_arg(a) for a in node.args] + [f"{k}={print_arg(a)}" for k, a in node.kwargs]
    body = f"{node.phase.value} {results}{' = ' if results else ''}{node.op}({', '.join(args)})"
    if node.checkpoint:
        body += f" checkpoint={node.checkpoint}"
    return body + (_origin(node.origin) if origins else "")


def print_arenas(arenas: Mapping[Phase, int]) -> str:
    """The bytes of each program's arena as their line, `arena fwd=43520 bwd=1024`."""
    return " ".join(["arena", *(f"{p.value}={arenas[p]}" for p in Phase if p in arenas)])


def print_foreign(name: str, row: ExternalOp) -> str:
    parts = [f"op {name}"]
    parts += [f"views({', '.join(map(str, row.views))})"] if row.views else []
    parts += [f"writes({', '.join(map(str, row.writes))})"] if row.writes else []
    parts += [flag for flag in ("random", "multi", "opaque") if getattr(row, flag)]
    return " ".join(parts)


def print_arg(arg: Arg) -> str:
    match arg:
        case None:
            return "none"
        case bool():
            return "true" if arg else "false"
        case int():
            return str(arg)
        case float():
            return repr(arg) if math.isfinite(arg) else ("nan" if math.isnan(arg) else ("inf" if arg > 0 else "-inf"))
        case str():
            return json.dumps(arg)
        case Value(name=name):
            return f"%{name}"
        case DType():
            return arg.value
        case Token(kind=kind, name=name):
            return f"{kind}({json.dumps(name)})"
        case Graph(name=name):
            return f"graph({json.dumps(name)})"
        case tuple():
            return "[" + ", ".join(print_arg(a) for a in arg) + "]"


def print_input(entry: Input) -> str:
    parts = [f"{entry.kind.value} %{entry.value.name}: {entry.value.type}"]
    parts += [json.dumps(entry.target)] if entry.target else []
    parts += [f"stage={entry.stage}"] if entry.stage is not None else []
    parts += [f"master={entry.master.value}"] if entry.master is not None else []
    parts += [f"offload={entry.offload}"] if entry.offload else []
    parts += [f"{axis}={place}" for axis, place in entry.cuts]
    return " ".join(parts)


def print_output(entry: Output) -> str:
    target = f" {json.dumps(entry.target)}" if entry.target else ""
    value = f"%{entry.value.name}" if entry.value is not None else "none"
    return f"return {entry.phase.value} {entry.kind.value}{target} {value}"


def _origin(origin: Origin) -> str:
    at = f" @ {json.dumps(origin.module)}" if origin.module or origin.file else ""
    file = f" {json.dumps(origin.file)}:{origin.line}" if origin.file else ""
    by = f" by {origin.made_by}" if origin.made_by else ""
    return at + file + by
