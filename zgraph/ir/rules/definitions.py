"""Ops in terms of others that a cut passes through where it does not pass through them.

    _log_softmax(x)             z - log(sum(exp(z)))   with z = x - amax(x)
    _softmax(x)                 e / sum(e)             with e = exp(x - amax(x))
    their backwards, of y       g - exp(y) sum(g)      and  g y - y sum(g y)
    native_dropout(x, p)        x * mask / (1 - p)     with mask = native_dropout(ones, p)
    nll_loss(x, t), a mean      s / n                  with s, n = nll_loss(x, t), a sum, and the labels that count

Whole, a softmax needs all that it works along. Spelled out, each rank has the largest and the sums of its part, and the
ranks exchange those alone: a loss of a vocabulary in parts. Of dropout, every rank draws the whole mask, and uses its
part: what is dropped is what would be on one rank. A mean of losses is a quotient of sums: each rank counts its labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from zgraph.ir.graph import Arg, ExternalOp, Graph, Node, Value
from zgraph.ir.types import DType, TensorType

__all__ = ["DEFINED", "defined", "dim_of", "spelled_out"]


class _Writer:
    """Writes nodes one after the other, with types of whole tensors."""

    def __init__(self, node: Node, fresh: Callable[[str], str]) -> None:
        self.node, self.fresh = node, fresh
        self.nodes: list[Node] = []
        self.dims = (dim_of(node) or 0,)
        self.dtype = node.results[0].tensor.dtype

    def op(self, name: str, *args: Arg, kept: bool = False, result: Value | None = None, **options: Arg) -> Value:
        """A node that makes what is like its first operand; `kept` reduces the dim to one."""
        first = args[0]
        assert isinstance(first, Value), "an op reads a tensor first"
        kind = first.tensor.contiguous(self.dtype)
        if kept:
            shape = tuple(1 if d == self.dims[0] else size for d, size in enumerate(kind.shape))
            kind = replace(kind, shape=shape)
        made = result or Value(self.fresh(f"{self.node.name}_{name.split('.')[1].lstrip('_')}"), kind)
        self.nodes.append(replace(self.node, op=name, args=args, results=(made,), kwargs=tuple(options.items())))
        return made

    def input(self) -> Value:
        """The first operand in the dtype of the result."""
        found = self.node.operands[0]
        if found.tensor.dtype is self.dtype:
            return found
        return self.op("aten._to_copy.default", found, dtype=self.dtype)


def dim_of(node: Node) -> int | None:
    """The dim that an op works along; None where no dim may be cut."""
    if node.op == DROPOUT:
        return None
    if node.op in LOSSES:
        return 0
    position = 2 if node.op.endswith("_backward_data.default") else 1
    dim, rank = node.args[position], len(node.operands[0].tensor.shape)
    assert isinstance(dim, int), "the dim is a number"
    return dim % max(rank, 1)


def _log_softmax(to: _Writer) -> None:
    x = to.input()
    z = to.op("aten.sub.Tensor", x, to.op("aten.amax.default", x, to.dims, True, kept=True))
    total = to.op("aten.sum.dim_IntList", to.op("aten.exp.default", z), to.dims, True, kept=True)
    to.op("aten.sub.Tensor", z, to.op("aten.log.default", total), result=to.node.results[0])


def _softmax(to: _Writer) -> None:
    x = to.input()
    z = to.op("aten.sub.Tensor", x, to.op("aten.amax.default", x, to.dims, True, kept=True))
    e = to.op("aten.exp.default", z)
    total = to.op("aten.sum.dim_IntList", e, to.dims, True, kept=True)
    to.op("aten.div.Tensor", e, total, result=to.node.results[0])


def _log_softmax_backward(to: _Writer) -> None:
    g, y = to.node.operands
    total = to.op("aten.sum.dim_IntList", g, to.dims, True, kept=True)
    scaled = to.op("aten.mul.Tensor", to.op("aten.exp.default", y), total)
    to.op("aten.sub.Tensor", g, scaled, result=to.node.results[0])


def _softmax_backward(to: _Writer) -> None:
    g, y = to.node.operands
    weighted = to.op("aten.mul.Tensor", g, y)
    total = to.op("aten.sum.dim_IntList", weighted, to.dims, True, kept=True)
    to.op("aten.sub.Tensor", weighted, to.op("aten.mul.Tensor", y, total), result=to.node.results[0])


def _dropout(to: _Writer) -> None:
    x, (made, mask) = to.node.operands[0], to.node.results
    p = to.node.args[1]
    assert isinstance(p, float), "a probability is a number"
    ones = to.op("aten.new_ones.default", x, tuple(x.tensor.shape))
    drawn = Value(to.fresh(f"{made.name}_drawn"), made.type)
    to.nodes.append(replace(to.node, args=(ones, p, None), results=(drawn, mask)))
    to.op("aten.mul.Scalar", to.op("aten.mul.Tensor", x, mask), 1 / (1 - p), result=made)


def _mean_loss(to: _Writer) -> None:
    loss, count = to.node.results
    total = Value(to.fresh(f"{loss.name}_sum"), loss.type)
    args = (*to.node.args[:3], SUM, *to.node.args[4:])
    to.nodes.append(replace(to.node, args=args, results=(total, count)))
    to.op("aten.div.Tensor", total, count, result=loss)


DROPOUT = "aten.native_dropout.default"

LOSSES = ("aten.nll_loss_forward.default", "part_nll_loss")
"""Losses of classes; the latter has classes cut already."""

MEAN, SUM = 1, 2
"""How losses are reduced, as torch counts the ways."""

DEFINED: Mapping[str, Callable[[_Writer], None]] = {
    "aten._log_softmax.default": _log_softmax,
    "aten._softmax.default": _softmax,
    "aten._log_softmax_backward_data.default": _log_softmax_backward,
    "aten._softmax_backward_data.default": _softmax_backward,
    DROPOUT: _dropout,
    **dict.fromkeys(LOSSES, _mean_loss),
}
"""Writers of what an op is made of, by the op."""


def defined(node: Node, fresh: Callable[[str], str]) -> tuple[Node, ...]:
    """The nodes that a node stands for, which make its results; none where it stands for itself.

    Args:
        node: the node.
        fresh: a name that is not taken, which begins with another.
    """
    if node.op not in DEFINED or not _is_plain(node):
        return ()
    writer = _Writer(node, fresh)
    DEFINED[node.op](writer)
    return tuple(writer.nodes)


def _is_plain(node: Node) -> bool:
    """Whether its operands and its result are dense floats; the backward casts nothing then."""
    if node.op in LOSSES:
        return len(node.operands) == 2 and node.args[3] == MEAN and len(node.operands[0].tensor.shape) == 2
    if node.op == DROPOUT:
        p = node.args[1]
        is_drawn = node.args[2] is True and isinstance(p, float) and 0 < p < 1
        return is_drawn and all(isinstance(size, int) for size in node.operands[0].tensor.shape)
    kinds = [v.type for v in (*node.operands, *node.results)]
    if not all(isinstance(k, TensorType) and k.shape and k.dtype in _FLOATS for k in kinds):
        return False
    return (
        not node.op.endswith("_backward_data.default")
        or len({k.dtype for k in kinds if isinstance(k, TensorType)}) == 1
    )


_FLOATS = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16})


def spelled_out(graph: Graph, names: frozenset[str], fresh: Callable[[str], str]) -> Graph:
    """The graph with some nodes in terms of others.

    Args:
        graph: on whole tensors.
        names: the nodes' names.
        fresh: a name that is not taken, which begins with another.
    """

    def written() -> Iterator[Node]:
        for node in graph.nodes:
            yield from (node.name in names and defined(node, fresh)) or (node,)

    nodes = tuple(written())
    used = {node.op: ExternalOp() for node in nodes if node.op.startswith("aten.")}
    return replace(graph, nodes=nodes, foreign={**used, **graph.foreign})
