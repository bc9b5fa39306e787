"""Who ends the life of what is gathered, and what may happen to memory that is under way.

Gathered parameters and what comes back from the host have one owner: they are released exactly once, directly behind
their last use. What a collective or a copy reads may be read meanwhile, not written to, released or sent again.
"""

from __future__ import annotations

from collections.abc import Iterator

from zgraph.ir import OPS, Graph, Node, Output, OutputKind, Phase, TensorType, num_data_ranks
from zgraph.ir.aliases import Aliases
from zgraph.ir.codecs import Sized
from zgraph.ir.coded_rules import codec_of
from zgraph.ir.graph import Value, values_in
from zgraph.ir.ops import brings, views
from zgraph.ir.verifier import Fault


class Storage:
    """The memory of each value, and what of it was gathered."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.aliases = Aliases(graph)
        self.gathered: dict[str, int] = {}
        for position, node in enumerate(graph.nodes):
            if self.brings(node):
                self.gathered.update((result.name, position) for result in node.results)
            else:
                self.aliases.add(node)

    def of(self, *values: Value) -> frozenset[str]:
        """The memory that these values may be in."""
        return self.aliases.roots(*(value.name for value in values))

    def brings(self, node: Node) -> bool:
        """Whether a node's results are memory that was gathered or brought back."""
        if not node.operands:
            return False
        source = node.operands[0].name
        if node.op == "wait":
            start = self.graph.producers.get(source)
            return start is not None and brings(start)
        return node.op == "unpack" and source in self.gathered


def owned(graph: Graph) -> Iterator[Fault]:
    """Memory that is gathered, or brought back from the host, is released once, directly behind its last use."""
    storage = Storage(graph)
    last: dict[str, int] = {}
    released: dict[str, int] = {}
    sending: dict[str, frozenset[str]] = {}
    for position, node in enumerate(graph.nodes):
        touched = storage.of(*node.operands, *node.results)
        touched |= frozenset().union(*(sending.get(v.name, frozenset()) for v in node.operands))
        if node.op != "release":
            last.update(dict.fromkeys(touched, position))
            if node.op in OPS and OPS[node.op].lane != "compute":
                sending.update((r.name, touched) for r in node.results)
            continue
        name = node.operands[0].name
        if name in released:
            yield position, f"releases %{name} a second time"
        released[name] = position
    returned = storage.aliases.roots(*graph.output_names)
    for name, made in storage.gathered.items():
        if name in returned:
            continue
        if name not in released:
            yield made, f"%{name} is gathered, or brought back from the host, and never released"
            continue
        between = graph.nodes[last.get(name, made) + 1 : released[name]]
        if late := next((n for n in between if brings(n) or _makes(graph, n)), None):
            yield released[name], f"releases %{name} late: %{late.name} takes memory after its last use"


def not_owned(graph: Graph) -> Iterator[Fault]:
    """Nothing is released but what was gathered or brought back: not an input, and not what ops make."""
    if any(node.op == "release" for node in graph.nodes):
        storage = Storage(graph)
        for position, node in enumerate(graph.nodes):
            if node.op == "release" and (name := node.operands[0].name) not in storage.gathered:
                yield position, f"releases %{name}, which was neither gathered nor brought back from the host"


def _makes(graph: Graph, node: Node) -> bool:
    """Whether a node computes: its results take new memory."""
    return node.op not in OPS and bool(node.results) and not views(graph, node)


def under_way(graph: Graph) -> Iterator[Fault]:
    """Memory that a collective or a copy reads is neither written to nor released before the wait."""
    storage = Storage(graph)
    busy: dict[str, Node] = {}
    starts: dict[str, Node] = {}
    reads: dict[int, frozenset[str]] = {}
    for position, node in enumerate(graph.nodes):
        row = graph.foreign.get(node.op)
        touched: frozenset[str] = frozenset()
        if row is not None and row.writes:
            args = tuple(node.args[i] for i in row.writes if i < len(node.args))
            touched = storage.of(*values_in(args))
        elif node.op == "release":
            touched = storage.of(node.operands[0])
        for root in sorted(touched & busy.keys()):
            did = "releases" if node.op == "release" else "writes to"
            yield position, f"{did} %{root} while {busy[root].op} of %{busy[root].name} reads it"
        if node.op in OPS and OPS[node.op].lane != "compute":
            sent = storage.of(*node.operands)
            reads[id(node)] = sent
            starts.update((r.name, node) for r in node.results)
            busy.update((root, node) for root in sent)
        elif node.op == "wait" and (start := starts.get(node.operands[0].name)) is not None:
            for root in reads[id(start)]:
                if busy.get(root) is start:
                    del busy[root]


def gathers(graph: Graph) -> Iterator[Fault]:
    """A parameter is gathered at most once in a phase; and stays for further micro-steps at stages 1 and 2 alone."""
    sources: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in graph.param_names}
    stages = {i.value.name: i.stage for i in graph.params}
    seen: dict[tuple[Phase, str], str] = {}
    returned = set(graph.output_names)
    for position, node in enumerate(graph.nodes):
        behind = frozenset().union(*(sources.get(v.name, frozenset()) for v in node.operands))
        is_gather = (brings(node) and OPS[node.op].lane == "comm") or (
            node.op == "reshard" and node.operands[0].tensor.is_sharded and not node.results[0].tensor.is_sharded
        )
        if node.op in OPS and OPS[node.op].prepares:
            sources.update((r.name, behind) for r in node.results)
        if not is_gather:
            continue
        keeps = bool(node.option("keep")) or _changes_copies(node)
        for name in sorted(behind):
            if (before := seen.setdefault((node.phase, name), node.name)) != node.name:
                yield position, f"gathers %{name} once more: %{before} did so in this phase"
            if keeps != (stages.get(name) in (1, 2)):
                does = "keeps" if keeps else "does not keep"
                yield (
                    position,
                    f"{does} the whole of %{name} for further micro-steps, but it is of stage {stages[name]}",
                )
        for result in node.results:
            if not graph.users.get(result.name) and result.name not in returned:
                yield position, f"gathers %{result.name}, which nothing reads"


def _changes_copies(gather: Node) -> bool:
    codec = codec_of(gather) if gather.option("codec") is not None else None
    return isinstance(codec, Sized) and codec.changes


def gradients(graph: Graph) -> Iterator[Fault]:
    """On one rank, too, a gradient lies in its master's memory; on a mesh the verifier sees to it."""
    entries, is_sharded = {i.value.name: i for i in graph.params}, num_data_ranks(graph.mesh) > 1
    for output in graph.outputs:
        if is_sharded or output.kind is not OutputKind.grad or output.value is None or output.target not in entries:
            continue
        entry, kind = entries[output.target], output.value.type
        if not isinstance(kind, TensorType) or entry.stage is None:
            continue
        if kind.is_on_host != bool(entry.offload):
            yield _maker(graph, output), f"the gradient of {entry.target} is {kind}, in another memory than its master"


def _maker(graph: Graph, output: Output) -> int | None:
    value = output.value
    return next((p for p, n in enumerate(graph.nodes) if value in n.results), None)


def at_rest(graph: Graph) -> Iterator[Fault]:
    """Parameters lie as their stage says: whole at stage 0, sharded at the others."""
    for entry in graph.params:
        kind = entry.value.type
        if num_data_ranks(graph.mesh) == 1 or entry.stage is None or not isinstance(kind, TensorType):
            continue
        if kind.is_sharded != (entry.stage > 0):
            yield None, f"%{entry.value.name} is of stage {entry.stage}, but {kind} at rest"
