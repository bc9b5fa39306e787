"""How collectives along a model axis run on this rank, and what each rank does alone in their place.

What they move is an op's result that the next op needs: a copy is sent, and what arrives is laid out as its type says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zgraph.bridge import parts
from zgraph.bridge.ranked_ops import runs
from zgraph.bridge.ring import runs as runs_ring
from zgraph.bridge.routes import arrived, begun, route_of
from zgraph.ir import Node, Partial, Shard, TensorType
from zgraph.runtime.agreement import described
from zgraph.runtime.futures import Future

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

Execute = Callable[..., Any]


def _of_axis(node: Node, session: Session) -> tuple[dist.ProcessGroup, int, int]:
    """The ranks of a node's model axis, how many they are, and which is this one."""
    group = session.store.ranks.axis_group(str(node.option("axis")))
    return group, dist.get_world_size(group), dist.get_rank(group)


def _places(node: Node, session: Session) -> tuple[TensorType, Any, Any]:
    """The type of the result, and the placements from and to which the node goes along its axis."""
    names = [axis.name for axis in session.store.ranks.axes]
    index, made = names.index(str(node.option("axis"))), node.results[0].tensor
    return made, node.operands[0].tensor.placement[index], made.placement[index]


def all_reduce(node: Node, session: Session) -> Execute:
    """The sum of what the ranks have, or the largest."""
    (group, _, _), (made, old, _) = _of_axis(node, session), _places(node, session)
    name, moved = described(node), session.moved(node)
    how = dist.ReduceOp.MAX if old == Partial("max") else dist.ReduceOp.SUM

    def execute(own: torch.Tensor) -> Future:
        total = own.clone(memory_format=torch.contiguous_format)
        session.enter("all-reduce", moved)
        work = dist.all_reduce(total, how, group=group, async_op=True)
        return Future(name, work, None, lambda: _laid(total, made))

    return execute


def all_gather(node: Node, session: Session) -> Execute:
    """The whole of which each rank has a part."""
    (group, size, _), (made, old, _) = _of_axis(node, session), _places(node, session)
    name, moved = described(node), session.moved(node)

    def execute(own: torch.Tensor) -> Future:
        sent = own.contiguous()
        found = [torch.empty_like(sent) for _ in range(size)]
        session.enter("all-gather", moved)
        work = dist.all_gather(found, sent, group=group, async_op=True)
        return Future(name, work, sent, lambda: _laid(parts.joined(found, old), made))

    return execute


def reduce_scatter(node: Node, session: Session) -> Execute:
    """This rank's part of the sum of what the ranks have: over gloo, by way of the sum."""
    (group, size, rank), (made, _, new) = _of_axis(node, session), _places(node, session)
    name, moved, is_gloo = described(node), session.moved(node), session.device.type == "cpu"

    def execute(own: torch.Tensor) -> Future:
        session.enter("reduce-scatter", moved)
        if is_gloo:
            total = own.clone(memory_format=torch.contiguous_format)
            work = dist.all_reduce(total, group=group, async_op=True)
            return Future(name, work, None, lambda: _laid(parts.cut(total, new, size)[rank], made))
        sent = [part.contiguous() for part in parts.cut(own, new, size)]
        out = torch.empty_like(sent[rank])
        work = dist.reduce_scatter(out, sent, group=group, async_op=True)
        return Future(name, work, sent, lambda: _laid(out, made))

    return execute


def all_to_all(node: Node, session: Session) -> Execute:
    """This rank's part by another dim of the whole of which each rank has a part."""
    (group, size, _), (made, old, new) = _of_axis(node, session), _places(node, session)
    name, moved = described(node), session.moved(node)
    assert isinstance(old, Shard), "an all-to-all begins at parts"

    def execute(own: torch.Tensor) -> Future:
        sent = torch.stack([part.contiguous() for part in parts.cut(own, new, size)])
        found = torch.empty_like(sent)
        session.enter("all-to-all", moved)
        work = dist.all_to_all_single(found, sent, group=group, async_op=True)
        return Future(name, work, sent, lambda: _laid(parts.joined(found.unbind(), old), made))

    return execute


def routed(node: Node, session: Session) -> Execute:
    """Rows for the ranks that have their groups, or from these: to each rank as many as it has of them."""
    (group, size, rank), name, moved = _of_axis(node, session), described(node), session.moved(node)
    at = 2 if node.op == "put_rows_start" else 0

    def execute(*tensors: torch.Tensor) -> Future:
        route = route_of(node, tensors, size, rank)
        made, sent = begun(node, tensors), tensors[at][route.sent].contiguous()
        found = sent.new_empty((sum(route.num_found), *sent.shape[1:]))
        session.enter("all-to-all", moved)
        work = dist.all_to_all_single(found, sent, route.num_found, route.num_sent, group=group, async_op=True)
        return Future(name, work, sent, lambda: arrived(node, made, found, route.found))

    return execute


def slice_(node: Node, session: Session) -> Execute:
    """This rank's part of what all have."""
    (_, size, rank), (made, _, new) = _of_axis(node, session), _places(node, session)
    return lambda own: parts.laid_out(parts.cut(own, new, size)[rank], made)


def first_rank(node: Node, session: Session) -> Execute:
    """All of it on the first rank, zeros on the others."""
    (_, _, rank), (made, _, _) = _of_axis(node, session), _places(node, session)
    return lambda own: parts.laid_out(torch.zeros_like(own) if rank else own, made)


def ranked(node: Node, session: Session) -> Execute:
    """An op that knows which part of a dim this rank has."""
    _, size, rank = _of_axis(node, session)
    return runs(node, session.device, rank, size)


def ring_attention(node: Node, session: Session) -> Execute:
    """Attention to keys and values that go round the ranks of an axis; what is sent is on its way meanwhile."""
    (group, size, rank), name, moved = _of_axis(node, session), described(node), session.moved(node)
    run = runs_ring(node, rank, size)

    def shift(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        sent, found = tensor.contiguous(), torch.empty_like(tensor)
        to, of = ([tensor.numel() if (rank + step) % size == peer else 0 for peer in range(size)] for step in (1, -1))
        session.enter("all-to-all", moved)
        work = dist.all_to_all_single(found, sent, of, to, group=group, async_op=True)
        assert work is not None, "this rank is of the group"
        held = [sent]

        def come() -> torch.Tensor:
            session.peers.wait(work, name)
            held.clear()
            return found

        return come

    return lambda *tensors: run(shift, *tensors)


def _laid(tensor: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """A tensor that has arrived, laid out as its type says."""
    if kind.strides is None:
        return tensor.contiguous()
    return parts.laid_out(tensor, kind)


EXCHANGES: Mapping[str, Callable[[Node, Session], Execute]] = {
    "all_reduce_start": all_reduce,
    "all_gather_start": all_gather,
    "reduce_scatter_start": reduce_scatter,
    "all_to_all_start": all_to_all,
}
"""Makers of starts along a model axis, by op."""
