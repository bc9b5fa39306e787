"""The backward for a call of which only the loss is differentiated.

A model that returns its loss and its logits has a tangent for each. Where nothing is computed from the logits, theirs
is all zeros, as large as they are, and is added to what the loss gives. Here such tangents are known to be zero, and
what only carries zeros is left out:

    tangent %t: f32[]
    tangent %u: f32[512, 4096]                                 <- zero
    bwd %a: f32[512, 4096] = aten._log_softmax_backward_data.default(...)
    bwd %b: f32[512, 4096] = aten.add.Tensor(%a, %u)           ->  readers of %b read %a
"""

from __future__ import annotations

from dataclasses import replace

from zgraph.ir import Graph, InputKind, Node, OutputKind, Phase, TensorType, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.external_ops import facts
from zgraph.ir.ops import is_pure, views
from zgraph.passes.dce import sweep


def zero_tangents(graph: Graph) -> frozenset[str]:
    """The tangents that are likely to be zero: all but the loss's, if one output alone is a scalar."""
    tangents = [i.value for i in graph.inputs if i.kind is InputKind.tangent]
    scalars = [t for t in tangents if isinstance(t.type, TensorType) and not t.type.shape]
    return frozenset(t.name for t in tangents if t not in scalars) if len(scalars) == 1 else frozenset()


def without_tangents(graph: Graph, tangents: frozenset[str]) -> Graph | None:
    """The graph with these tangents taken as zero.

    None where an op reads a zero that it cannot do without, where two gradients would share memory, or where a
    parameter's would be zero: collectives must stay the same on every rank, whatever each rank differentiates.
    """
    zero, same = set(tangents), dict[str, Value]()
    kept: list[Node] = []
    for node in graph.nodes:
        if node.phase is Phase.forward:
            kept.append(node)
            continue
        node = node.substitute(same)
        zeros = [v.name in zero for v in node.operands]
        if not any(zeros):
            kept.append(node)
        elif facts(node.op).zero == "all" and not node.kwargs and (other := _other_summand(node, zeros)):
            same[node.name] = other
        elif _is_zero(graph, node, zeros):
            zero.update(r.name for r in node.results)
        else:
            return None
    params = {i.value.name for i in graph.params}
    outputs = []
    for output in graph.outputs:
        value = output.value
        if value is not None and output.phase is not Phase.forward:
            if value.name in zero and output.kind is OutputKind.grad and output.target in params:
                return None
            value = None if value.name in zero else same.get(value.name, value)
        outputs.append(replace(output, value=value))
    inputs = tuple(i for i in graph.inputs if i.value.name not in tangents)
    loss_only = replace(graph, inputs=inputs, nodes=tuple(kept), outputs=tuple(outputs))
    loss_only = sweep(loss_only, lambda node: is_pure(graph, node))
    return None if _gradients_share_memory(loss_only) else loss_only


def _gradients_share_memory(graph: Graph) -> bool:
    """Whether a gradient lies in memory that is not its own: a sum that was left out may have been what parted two."""
    memory = Memory(graph)
    reduced = {r.name for n in graph.nodes if n.op == "unpack" for r in n.results}
    kept = [o.value for o in graph.outputs if o.kind is OutputKind.grad and o.value is not None]
    raw = [v for v in kept if v.name not in reduced]  # members of a bucket do not overlap
    raw += [v for n in graph.nodes if n.op == "accumulate" for v in n.operands]
    roots = [root for value in raw for root in memory.roots(value.name)]
    made = {r.name for n in graph.nodes if n.phase is not Phase.forward for r in n.results}
    return len(set(roots)) < len(roots) or not made.issuperset(roots)


def _other_summand(node: Node, zeros: list[bool]) -> Value | None:
    """The summand that is the sum, if the other is zero and both are tensors of the sum's type."""
    if len(zeros) != 2 or all(zeros):
        return None
    other = node.operands[zeros.index(False)]
    return other if other.type == node.results[0].type else None


def _is_zero(graph: Graph, node: Node, zeros: list[bool]) -> bool:
    match facts(node.op).zero:
        case "any":
            return any(zeros)
        case "all":
            return all(zeros)
        case "first":
            return zeros[0]
    return zeros[0] and (node.op in ("cast", "copy") or bool(views(graph, node)))
