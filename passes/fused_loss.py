"""The cross-entropy of a projection as one op: logits that nothing else reads are never whole in memory.

    fwd %z: bf16[T, V] = aten.mm.default(%x, %wt)          fwd %loss, %number, %lse =
    fwd %f: f32[T, V] = aten._to_copy.default(%z)     ->       zgraph.linear_cross_entropy.default(%x, %w, %target)
    fwd %p: f32[T, V] = aten._log_softmax.default(%f)
    fwd %loss, %number = aten.nll_loss_forward.default(%p, %target)

and in the backward the two matmuls with the logits' gradient likewise. The logits are computed once more for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from zgraph.ir import Builder, DType, Foreign, Graph, Node, Phase, TensorType, Value

FORWARD = "zgraph.linear_cross_entropy.default"
BACKWARD = "zgraph.linear_cross_entropy_backward.default"

_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten._to_copy.default")
_REDUCTIONS = {1: True, 2: False}
"""torch's numbers for a mean and a sum."""


@dataclass(frozen=True)
class _Loss:
    """The parts of a loss in a graph."""

    loss: Node
    gradients: tuple[Node, Node] | None
    tangent: Value | None
    x: Value
    weight: Value
    target: Value
    ignore_index: int
    mean: bool


def fused_losses(graph: Graph, made_by: str) -> Graph:
    """The graph with every such loss as one op; the nodes that it replaces are left for `dce`."""
    found = [loss for node in graph.nodes if node.op == "aten.nll_loss_forward.default" for loss in _found(graph, node)]
    if not found:
        return graph
    builder = Builder(graph, made_by)
    instead: dict[str, list[Node]] = {}
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    for loss in found:
        instead.update(_replaced(loss, builder, position))
    nodes = [new for node in graph.nodes for new in (instead.get(node.name, [node]) if node.results else [node])]
    foreign = {**graph.foreign, FORWARD: Foreign(multi=True), BACKWARD: Foreign(multi=True)}
    return replace(graph, nodes=tuple(nodes), foreign=foreign)


def _replaced(loss: _Loss, builder: Builder, position: Mapping[str, int]) -> dict[str, list[Node]]:
    """What stands in the place of nodes, by their names."""
    node = loss.loss
    lse = builder.value(f"{node.name}_lse", TensorType(DType.f32, loss.target.tensor.shape))
    options = (loss.ignore_index, loss.mean)
    origin = builder.origin(node.origin)
    forward = (loss.x, loss.weight, loss.target, *options)
    found = {node.name: [Node(FORWARD, forward, (*node.results, lse), (), Phase.forward, origin)]}
    if loss.gradients is not None:
        for_x, for_weight = loss.gradients
        reads = (loss.tangent, loss.x, loss.weight, loss.target, node.results[1], lse, *options)
        results = (*for_x.results, *for_weight.results)
        first, second = sorted(loss.gradients, key=lambda n: position[n.name])
        found[second.name] = []
        found[first.name] = [Node(BACKWARD, reads, results, (), first.phase, builder.origin(first.origin))]
    return found


def _found(graph: Graph, node: Node) -> Iterator[_Loss]:
    """The loss that a node ends, if its logits are read by nothing else."""
    probabilities, target, weights, reduction, ignore_index = node.args
    softmax = _maker(graph, probabilities)
    if weights is not None or reduction not in _REDUCTIONS or not isinstance(ignore_index, int):
        return
    if softmax is None or softmax.op != "aten._log_softmax.default" or not isinstance(target, Value):
        return
    chain = [softmax]
    while (maker := _maker(graph, chain[-1].args[0])) is not None and maker.op in _VIEWS:
        chain.append(maker)
    if maker is None or maker.op != "aten.mm.default":
        return
    x, turned = maker.args
    weight = _maker(graph, turned)
    if weight is None or weight.op != "aten.t.default" or not isinstance(x, Value) or not _fit(maker, softmax, x):
        return
    inside = {n.name for n in (*chain, maker)}
    backward = next((n for n in _readers(graph, softmax) if n.op == "aten.nll_loss_backward.default"), None)
    gradients: tuple[Node, Node] | None = None
    tangent: Value | None = None
    if backward is not None:
        gradient = _gradient(graph, backward)
        if gradient is None or (gradients := _matmuls(graph, gradient, x, weight)) is None:
            return
        tangent = backward.operands[0]
        inside.add(backward.name)
        inside |= {n.name for n in _readers(graph, softmax) if n.op == "aten._log_softmax_backward_data.default"}
    inside.add(node.name)
    if any(n.name in graph.output_names for n in (*chain, maker)):
        return
    if any(reader.name not in inside for n in (*chain, maker) for reader in _readers(graph, n)):
        return
    yield _Loss(node, gradients, tangent, x, weight.operands[0], target, ignore_index, _REDUCTIONS[int(str(reduction))])


def _fit(matmul: Node, softmax: Node, x: Value) -> bool:
    """Whether rows stay rows from the matmul to the softmax, over its classes."""
    logits, last = matmul.results[0].tensor, softmax.results[0].tensor
    return (
        len(last.shape) == 2 and last.shape == logits.shape and softmax.args[1] in (1, -1) and x.tensor.strides is None
    )


def _gradient(graph: Graph, backward: Node) -> Value | None:
    """The gradient of the logits, where it leaves what belongs to the loss."""
    readers = _readers(graph, backward)
    if len(readers) != 1 or readers[0].op != "aten._log_softmax_backward_data.default":
        return None
    node = readers[0]
    while len(readers := _readers(graph, node)) == 1 and readers[0].op in _VIEWS:
        node = readers[0]
    return node.results[0]


def _matmuls(graph: Graph, gradient: Value, x: Value, turned: Node) -> tuple[Node, Node] | None:
    """The matmuls that make the gradients of x and of the weight, if they are all that reads the logits' gradient."""
    for_x = for_weight = None
    maker = graph.producers[gradient.name]
    for reader in _readers(graph, maker):
        if reader.op == "aten.mm.default" and reader.args[0] == gradient and _is_weight(graph, reader.args[1], turned):
            for_x = reader
        elif reader.op == "aten.t.default":
            users = _readers(graph, reader)
            if len(users) != 1 or users[0].op != "aten.mm.default" or users[0].args[1] != x:
                return None
            for_weight = users[0]
        else:
            return None
    return None if for_x is None or for_weight is None else (for_x, for_weight)


def _is_weight(graph: Graph, value: object, turned: Node) -> bool:
    """Whether a value is the weight, or its transpose transposed."""
    if value == turned.operands[0]:
        return True
    maker = _maker(graph, value)
    return maker is not None and maker.op == "aten.t.default" and maker.operands[0] == turned.results[0]


def _maker(graph: Graph, value: object) -> Node | None:
    return graph.producers.get(value.name) if isinstance(value, Value) else None


def _readers(graph: Graph, node: Node) -> list[Node]:
    return [graph.nodes[u] for r in node.results for u in graph.users.get(r.name, ())]
