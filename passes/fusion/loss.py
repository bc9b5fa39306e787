"""The cross-entropy as one op: nothing as large as the logits beside them, nor they themselves if only it reads them.

    fwd %z: bf16[T, V] = aten.mm.default(%x, %wt)          fwd %loss, %number, %lse =
    fwd %f: f32[T, V] = aten._to_copy.default(%z)     ->       zgraph.linear_cross_entropy.default(%x, %w, %target)
    fwd %p: f32[T, V] = aten._log_softmax.default(%f)
    fwd %loss, %number = aten.nll_loss_forward.default(%p, %target)

and in the backward the two matmuls with the logits' gradient likewise. The logits are computed once more for that.
Where they are returned, `zgraph.cross_entropy` reads them, and makes their gradient from them in one go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from zgraph.ir import Arg, Builder, DType, ExternalOp, Graph, Node, Phase, TensorType, Value
from zgraph.ir.external_ops import (
    CAST,
    LOSS,
    LOSS_BACKWARD,
    PROJECTED_LOSS,
    PROJECTED_LOSS_BACKWARD,
    VIEW,
)
from zgraph.passes.analysis.rows import same_rows

_VIEWS = (VIEW, "aten._unsafe_view.default")
_REDUCTIONS = {1: True, 2: False}
"""torch's numbers for a mean and a sum."""


@dataclass(frozen=True)
class _Loss:
    """A loss in a graph.

    Args:
        node: what makes it.
        logits: what it is made of, before casts.
        target: the classes.
        options: the target that counts for nothing, and whether the loss is a mean.
        inside: the names of nodes that nothing else reads from.
        tangent: the gradient of the loss, if there is a backward.
        gradient: the last node that makes the gradient of the logits there.
    """

    node: Node
    logits: Value
    target: Value
    options: tuple[int, bool]
    inside: frozenset[str]
    tangent: Value | None
    gradient: Node | None


@dataclass(frozen=True)
class _Projection:
    """The operands of the matmul that makes the logits, and the two matmuls that make their gradients."""

    x: Value
    weight: Value
    gradients: tuple[Node, Node] | None


def fused_losses(graph: Graph, made_by: str) -> Graph:
    """The graph with every such loss as one op; the nodes that it replaces are left for `dce`."""
    losses = _losses(graph)
    if not losses:
        return graph
    builder = Builder(graph, made_by)
    instead: dict[str, list[Node]] = {}
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    for loss in losses:
        projection = _projection(graph, loss)
        instead.update(_plain(loss, builder) if projection is None else _linear(loss, projection, builder, position))
    nodes = [new for node in graph.nodes for new in (instead.get(node.name, [node]) if node.results else [node])]
    own = {op: ExternalOp(multi=True) for op in (PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD, LOSS)}
    own |= {LOSS_BACKWARD: ExternalOp(), CAST: ExternalOp(), VIEW: ExternalOp(views=(0,))}
    return replace(graph, nodes=tuple(nodes), foreign={**graph.foreign, **own})


def loss_nodes(graph: Graph) -> frozenset[str]:
    """The names of the nodes of all such losses: what they read and make is as large as the logits."""
    return frozenset().union(*(loss.inside for loss in _losses(graph)))


def _losses(graph: Graph) -> list[_Loss]:
    return [found for n in graph.nodes if n.op == "aten.nll_loss_forward.default" and (found := _loss(graph, n))]


def _forward(
    loss: _Loss, op: str, reads: tuple[Value, ...], builder: Builder
) -> tuple[list[Node], tuple[Value, Value]]:
    """The op that makes the loss, with casts to what is wanted; and what it keeps: a number of tokens, one of each."""
    computed_in = DType.f64 if loss.logits.tensor.dtype is DType.f64 else DType.f32
    origin = builder.origin(loss.node.origin)
    made: list[Value] = []
    casts: list[Node] = []
    for wanted in loss.node.results:
        if wanted.tensor.dtype is computed_in:
            made.append(wanted)
            continue
        made.append(builder.value(f"{wanted.name}_{computed_in.value}", replace(wanted.tensor, dtype=computed_in)))
        options = (("dtype", wanted.tensor.dtype),)
        casts.append(Node(CAST, (made[-1],), (wanted,), options, Phase.forward, origin))
    lse = builder.value(f"{loss.node.name}_lse", TensorType(computed_in, loss.target.tensor.shape))
    args: tuple[Arg, ...] = (*reads, loss.target, *loss.options)
    return [Node(op, args, (*made, lse), (), Phase.forward, origin), *casts], (made[1], lse)


def _linear(
    loss: _Loss, projection: _Projection, builder: Builder, position: Mapping[str, int]
) -> dict[str, list[Node]]:
    """Replacement nodes of the loss that takes the projection in, by the name of the node that they replace."""
    forward, kept = _forward(loss, PROJECTED_LOSS, (projection.x, projection.weight), builder)
    found = {loss.node.name: forward}
    if projection.gradients is not None:
        for_x, for_weight = projection.gradients
        args = (loss.tangent, projection.x, projection.weight, loss.target, *kept, *loss.options)
        first, second = sorted(projection.gradients, key=lambda n: position[n.name])
        results = (*for_x.results, *for_weight.results)
        found[second.name] = []
        found[first.name] = [
            Node(PROJECTED_LOSS_BACKWARD, args, results, (), first.phase, builder.origin(first.origin))
        ]
    return found


def _plain(loss: _Loss, builder: Builder) -> dict[str, list[Node]]:
    """Replacement nodes of the loss where the logits stay, by the name of the node that they replace."""
    forward, kept = _forward(loss, LOSS, (loss.logits,), builder)
    found = {loss.node.name: forward}
    if (node := loss.gradient) is not None:
        wanted, origin = node.results[0], builder.origin(node.origin)
        is_same = wanted.tensor.shape == loss.logits.tensor.shape
        made = wanted if is_same else builder.value(f"{wanted.name}_rows", loss.logits.type)
        args = (loss.tangent, loss.logits, loss.target, *kept, *loss.options)
        found[node.name] = [Node(LOSS_BACKWARD, args, (made,), (), node.phase, origin)]
        if not is_same:
            shape = wanted.tensor.shape
            found[node.name].append(Node(VIEW, (made, shape), (wanted,), (), node.phase, origin))
    return found


def _loss(graph: Graph, node: Node) -> _Loss | None:
    """The loss that a node makes, if nothing else reads what is between it and the logits."""
    probabilities, target, weights, reduction, ignore_index = node.args
    softmax = _maker(graph, probabilities)
    if weights is not None or reduction not in _REDUCTIONS or not isinstance(ignore_index, int):
        return None
    if softmax is None or softmax.op != "aten._log_softmax.default" or not isinstance(target, Value):
        return None
    chain = [softmax]
    while (maker := _maker(graph, chain[-1].args[0])) is not None and maker.op in (CAST, *_VIEWS):
        chain.append(maker)
    logits = chain[-1].operands[0]
    if not _are_rows(logits, softmax):
        return None
    # a view that others read too is no more than a name of the logits
    while len(chain) > 1 and chain[-1].op in _VIEWS and same_rows(logits, chain[-1].results[0]):
        logits = chain.pop().results[0]
    inside = {node.name, *(n.name for n in chain)}
    readers = graph.readers(*softmax.results)
    backward = next((n for n in readers if n.op == "aten.nll_loss_backward.default"), None)
    gradient = None
    if backward is not None:
        gradient = _gradient(graph, backward)
        if gradient is None or gradient.results[0].tensor.dtype is not logits.tensor.dtype:
            return None
        inside.add(backward.name)
        inside |= {n.name for n in readers if n.op == "aten._log_softmax_backward_data.default"}
        if not all(isinstance(d, int) for d in gradient.results[0].tensor.shape):
            return None
    if any(n.name in graph.output_names for n in chain):
        return None
    if any(r.name not in inside for n in chain for r in graph.readers(*n.results)):
        return None
    options = (ignore_index, _REDUCTIONS[int(str(reduction))])
    tangent = None if backward is None else backward.operands[0]
    return _Loss(node, logits, target, options, frozenset(inside), tangent, gradient)


def _are_rows(logits: Value, softmax: Node) -> bool:
    """Whether the softmax is over the classes of each token's logits."""
    before, last = logits.tensor, softmax.results[0].tensor
    is_last = len(last.shape) == 2 and softmax.args[1] in (1, -1)
    return is_last and before.strides is None and before.shape[-1:] == last.shape[-1:] and before.numel == last.numel


def _projection(graph: Graph, loss: _Loss) -> _Projection | None:
    """The matmul that makes the logits, if nothing else reads them nor their gradient."""
    matmul = _maker(graph, loss.logits)
    views = [loss.logits]
    while matmul is not None and matmul.op in _VIEWS:
        views.append(matmul.operands[0])
        matmul = _maker(graph, views[-1])
    if matmul is None or matmul.op != "aten.mm.default":
        return None
    x, turned = matmul.args
    weight = _maker(graph, turned)
    if weight is None or weight.op != "aten.t.default" or not isinstance(x, Value) or x.tensor.strides is not None:
        return None
    inside = loss.inside | {v.name for v in views}
    for value in views:
        if value.name in graph.output_names or any(r.name not in inside for r in graph.readers(value)):
            return None
    gradients = None
    if loss.gradient is not None and (gradients := _matmuls(graph, loss.gradient, x, weight)) is None:
        return None
    return _Projection(x, weight.operands[0], gradients)


def _gradient(graph: Graph, backward: Node) -> Node | None:
    """The last node of the loss's backward that makes the gradient of the logits, past casts and views.

    None where the backward is not that of a log-softmax with one reader.
    """
    readers = graph.readers(*backward.results)
    if len(readers) != 1 or readers[0].op != "aten._log_softmax_backward_data.default":
        return None
    node = readers[0]
    while len(readers := graph.readers(*node.results)) == 1 and readers[0].op in (CAST, *_VIEWS):
        node = readers[0]
    return node


def _matmuls(graph: Graph, maker: Node, x: Value, turned: Node) -> tuple[Node, Node] | None:
    """The matmuls that make the gradients of x and of the weight, if they are all that reads the logits' gradient."""
    for_x = for_weight = None
    gradient = maker.results[0]
    for reader in graph.readers(*maker.results):
        if reader.op == "aten.mm.default" and reader.args[0] == gradient and _is_weight(graph, reader.args[1], turned):
            for_x = reader
        elif reader.op == "aten.t.default":
            users = graph.readers(*reader.results)
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
