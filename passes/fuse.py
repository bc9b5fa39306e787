"""Fuse the ops between matmuls into kernels over rows, in the forward and in the backward.

    fwd %a: bf16[8, 64] = aten.silu.default(%gate)
    fwd %y: bf16[8, 64] = aten.mul.Tensor(%a, %up)
                    |
                    v
    fwd %y: bf16[8, 64] = zgraph.rows.default([%gate, %up], "silu_mul 64: x0 bf16[M,N], x1 bf16[M,N] -> ...")

A group grows along the program: an op joins the groups that it reads from, as long as nothing else has read from them.
So a kernel can run where its last op stood. Kernels of the backward compute values of the forward again where that
reads no more memory: a norm keeps its input and one number a row, not the normalized rows.

A dropout's mask is a function of a seed and of positions. It is drawn again where it is needed, never kept, and differs
from torch's own. Numbers inside a kernel are fp32, so that casts between its ops round no more.
`fusion/patterns.py` says what can be fused. Losses (`fusion/loss.py`) and rotary embeddings (`fusion/rotary.py`) are
ops of their own.

With `only_measured`, the ops are left to Inductor, which compiles what is between collectives: a kernel takes the place
of those that it was measured to be faster than, and a loss that of its ops where the budget has no room for its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

from zgraph.ir import Graph, Node
from zgraph.ir.external_ops import COMPILED, ROWS, facts
from zgraph.passes.analysis.lookahead import step_memory
from zgraph.passes.core.base import Choice, Context, Numerics, Pass
from zgraph.passes.dce import DeadCode
from zgraph.passes.fusion.candidates import Candidates
from zgraph.passes.fusion.groups import Groups
from zgraph.passes.fusion.loss import fused_losses, loss_nodes
from zgraph.passes.fusion.rotary import fused_subgraphs
from zgraph.passes.fusion.rows import FOREIGN, Group


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse the ops between matmuls into kernels over rows, in the forward and in the backward."""

    name: ClassVar[str] = "fuse"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed"})

    matmuls: Choice = "auto"
    only_measured: bool = False

    def __post_init__(self) -> None:
        if self.matmuls not in get_args(Choice):
            raise ValueError("matmuls must be never, auto or always")

    def run(self, graph: Graph, context: Context) -> Graph:
        graph = self.prepared(graph, context)
        groups, found = Groups(graph, self.name), list[Group]()
        for each in groups.candidates(self.matmuls, context.hints):
            candidate = each.best(context, self.matmuls, only_measured=self.only_measured)
            if candidate != "aten":
                each.group.matmul = each.matmul if candidate in ("matmul", "library") else None
                each.group.call = each.nodes["library"] if candidate == "library" else None
                each.group.op = COMPILED if candidate == "inductor" else ROWS
                found.append(each.group)
        while True:
            fused = {id(node) for group in found for node in group.members}
            needed = groups.read(found, fused)
            kernels = [(group, group.call or groups.kernel(group, needed)) for group in found]
            done = [(group, nodes) for group, nodes in kernels if nodes is not None and groups.has_seeds(group, fused)]
            if len(done) == len(found):
                break
            found = [group for group, _ in done]
        return DeadCode().run(_replaced(groups.graph, done) if done else graph, context)

    def prepared(self, graph: Graph, context: Context) -> Graph:
        """The graph with losses and rotary embeddings as single ops, unless they are left to Inductor."""
        if not self.only_measured:
            return fused_losses(fused_subgraphs(graph, self.name), self.name)
        limit = context.fitting.step_bytes
        if limit is None or not (nodes := loss_nodes(graph)):
            return graph
        alive = (m.total_bytes for m in step_memory(graph, context).moments if m.node in nodes)
        return fused_losses(graph, self.name) if max(alive, default=0) > limit else graph


def candidates(graph: Graph, context: Context, fuse: Fuse | None = None) -> list[Candidates]:
    """How the groups of a captured graph can be run, to measure.

    Args:
        graph: as the pass will see it.
        context: its context.
        fuse: the pass, as the recipe has it.
    """
    fuse = fuse or Fuse()
    return list(Groups(fuse.prepared(graph, context), fuse.name).candidates("auto", context.hints))


def _replaced(graph: Graph, kernels: Sequence[tuple[Group, tuple[Node, ...]]]) -> Graph:
    """The graph with each kernel where its last op stood, and behind it the views of what it makes."""
    inside = {id(node): number for number, (group, _) in enumerate(kernels) for node in group.members}
    last = {id(group.nodes[-1]): number for number, (group, _) in enumerate(kernels)}
    waiting: dict[str, int] = {}
    delayed: dict[int, list[Node]] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        number = inside.get(id(node))
        if number is not None:
            waiting.update((r.name, number) for r in node.results)
            if last.get(id(node)) == number:
                made = {r.name for n in kernels[number][1] for r in n.results}
                nodes += kernels[number][1]
                for view in delayed.pop(number, ()):
                    if all(v.name in made or v.name not in waiting for v in view.operands):
                        nodes.append(view)
                        made.update(r.name for r in view.results)
                for name in [n for n, at in waiting.items() if at == number]:
                    del waiting[name]
            continue
        held = [waiting[v.name] for v in node.operands if v.name in waiting]
        if held:
            assert facts(node.op).keeps_rows, "a group is closed by what reads from it"
            delayed.setdefault(held[0], []).append(node)
            waiting.update((r.name, held[0]) for r in node.results)
            continue
        nodes.append(node)
    used = {node.op for node in nodes}
    return replace(
        graph, nodes=tuple(nodes), foreign={**graph.foreign, **{op: row for op, row in FOREIGN.items() if op in used}}
    )
