"""How each of zgraph's own ops runs on this rank. One maker an op: from a node to the callable that executes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zgraph.bridge import float8, private_runtime
from zgraph.bridge.aten import TO_TORCH
from zgraph.ir import DType, Node, Partial, Placement, TensorType
from zgraph.ir.arena import offsets
from zgraph.ir.layout import BucketLayout, bucket_layout, is_even
from zgraph.ir.rules import PARTS, ROUTED
from zgraph.ir.rules.ring import RING
from zgraph.runtime import coded
from zgraph.runtime.agreement import described
from zgraph.runtime.exchanges import EXCHANGES, first_rank, ranked, ring_attention, routed, slice_
from zgraph.runtime.futures import Future, Work
from zgraph.runtime.gradients import with_unreduced
from zgraph.runtime.host import Copy

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

Execute = Callable[..., Any]


def _one_or_all(futures: list[Future]) -> Any:
    """The result of a start: its future, or a list of them where it moves several tensors."""
    return futures if len(futures) > 1 else futures[0]


def _item(made: list[torch.Tensor], index: int) -> torch.Tensor:
    """The tensor that a collective has put into its list by now; the list lets go of it."""
    result, made[index] = made[index], torch.empty(0)
    return result


def offload_start(node: Node, session: Session) -> Execute:
    """A copy in the host's memory."""
    host, name = session.host, described(node)

    def execute(tensor: torch.Tensor) -> Future:
        copied, work = host.offload(tensor)
        return Future(name, work, tensor, lambda: copied)

    return execute


def reload_start(node: Node, session: Session) -> Execute:
    """A copy on the device of what is on the host."""
    host, place, name = session.host, _place(node), described(node)

    def execute(tensor: torch.Tensor, arena: torch.Tensor | None = None) -> Future:
        target = place(arena, 0, tensor.numel(), tensor.dtype).view(tensor.size()) if arena is not None else None
        copied, work = host.reload(tensor, target)
        return Future(name, work, tensor, lambda: copied)

    return execute


def _place(node: Node) -> Callable[[torch.Tensor, int, int, torch.dtype], torch.Tensor]:
    """Where in the arena a result of the node lies, in one dimension."""
    at = offsets(node)

    def place(arena: torch.Tensor, index: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return arena[at[index] : at[index] + numel * dtype.itemsize].view(dtype)

    return place


def all_gather_start(node: Node, session: Session) -> Execute:
    """Every rank sends its chunks once to every other, into memory that becomes the whole tensors.

    Chunks on the host are brought to the device first, on the lane of copies: what computes waits for neither.
    """
    keys = [object() if node.option("keep") else None for _ in node.results]
    empty, gather, host = _whole_memory(node, session), _gather(node, session, keys), session.host
    are_on_host, name = node.operands[0].tensor.is_on_host, described(node)

    def execute(*chunks: torch.Tensor, arena: torch.Tensor | None = None) -> Any:
        kept = [k for key in keys if key is not None and (k := session.kept_copy(key)) is not None]
        if len(kept) == len(keys):
            return _one_or_all([Future(name, None, None, partial(_item, kept, i)) for i in range(len(kept))])
        outs = empty(chunks, arena)  # of the stream that computes, where they are read and freed
        if not are_on_host:
            return gather(chunks, outs)
        pairs = [host.reload(chunk) for chunk in chunks]
        with host.after(copy for _, copy in pairs):
            return gather([chunk for chunk, _ in pairs], outs)

    return execute


def _whole_memory(
    node: Node, session: Session
) -> Callable[[Sequence[torch.Tensor], torch.Tensor | None], list[torch.Tensor]]:
    """Memory on the device for what a gather gives, one row a rank."""
    num_shards, place = session.num_shards, _place(node)

    def empty(chunks: Sequence[torch.Tensor], arena: torch.Tensor | None) -> list[torch.Tensor]:
        if arena is None:
            return [torch.empty(num_shards, c.numel(), dtype=c.dtype, device=session.device) for c in chunks]
        flats = [place(arena, i, num_shards * c.numel(), c.dtype) for i, c in enumerate(chunks)]
        return [flat.view(num_shards, chunk.numel()) for flat, chunk in zip(flats, chunks, strict=True)]

    return empty


def _gather(
    node: Node, session: Session, keys: Sequence[object | None]
) -> Callable[[Sequence[torch.Tensor], list[torch.Tensor]], Any]:
    """A gather of chunks on the device into memory that is there; a result with a key may be kept."""
    wanted = [(_shape(r.tensor), _numel(r.tensor)) for r in node.results]
    name, moved, is_sized = described(node), session.moved(node), coded.is_sized(node)

    def gather(chunks: Sequence[torch.Tensor], outs: list[torch.Tensor]) -> Any:
        if session.lane is not None:
            parts = [(out.unbind(), chunk) for out, chunk in zip(outs, chunks, strict=True)]
            work: Work = session.lane.all_gather(*parts, moved=moved, sized=is_sized)
        else:
            session.enter("all-gather", moved)
            pairs = [(out.view(-1), chunk) for out, chunk in zip(outs, chunks, strict=True)]
            work = private_runtime.all_gathers(pairs, session.shard_group)

        def finish(index: int) -> torch.Tensor:
            shape, numel = wanted[index]
            whole = _item(outs, index).view(-1)[:numel].view(shape)
            if (key := keys[index]) is not None:
                session.keep_copy(key, whole)
            return whole

        return _one_or_all([Future(name, work, c, partial(finish, i)) for i, c in enumerate(chunks)])

    return gather


def reduce_scatter_start(node: Node, session: Session) -> Execute:
    """The sums or means over the ranks, as the operands' type says, each rank keeping its chunks."""
    num_shards, kind = session.num_shards, node.operands[0].tensor
    divisor, ops = session.divisor(kind), (_op(kind.placement[-1]), _op(kind.placement[-2:][0]))
    pads = [_padder(v.tensor, num_shards) for v in node.operands]
    name, moved = described(node), session.moved(node)

    def execute(*wholes: torch.Tensor) -> Any:
        padded = [pad(whole).view(num_shards, -1) for pad, whole in zip(pads, wholes, strict=True)]
        if session.lane is not None:
            transfer = session.lane.reduce_scatter(*(p.unbind() for p in padded), moved=moved, divisor=divisor)
            work: Work = transfer
            outs: list[torch.Tensor] = transfer.result
        else:
            session.enter("reduce-scatter", moved)
            outs = [torch.empty_like(p[0]) for p in padded]
            pairs = [(out, p.view(-1)) for out, p in zip(outs, padded, strict=True)]
            work = private_runtime.reduce_scatters(pairs, session.shard_group, session.copy_group, ops)
        return _one_or_all([Future(name, work, p, partial(_item, outs, i)) for i, p in enumerate(padded)])

    return execute


def all_reduce_start(node: Node, session: Session) -> Execute:
    """The sum or mean over the ranks, as the operand's type says, on every rank.

    Where nobody else needs the operand, its memory is reduced in place; NCCL divides as it sums.
    """
    num_ranks, kind = session.num_ranks, node.operands[0].tensor
    divisor = session.divisor(kind)
    shape, numel, name, moved = _shape(kind), _numel(kind), described(node), session.moved(node)
    pad, is_padded = _padder(kind, num_ranks), not is_even(kind.shape, num_ranks)

    averages = session.lane is None and divisor == num_ranks > 1 and private_runtime.has_averages(session.group)

    def execute(own: torch.Tensor, *, spare: bool = False) -> Future:
        if session.lane is not None:
            total = pad(own) if is_padded else own.clone(memory_format=torch.contiguous_format).view(-1)
            work: Work = session.lane.all_reduce(total.view(num_ranks, -1).unbind(), moved, divisor)
        else:
            session.enter("all-reduce", moved)
            if spare and own.is_contiguous() and own.nbytes == own.untyped_storage().nbytes():
                total = own if averages or divisor == 1 else own.div_(divisor)
            else:
                copied = own.clone(memory_format=torch.contiguous_format) if averages or divisor == 1 else own / divisor
                total = copied.contiguous()
            total, op = total.view(-1), dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
            work = dist.all_reduce(total, op, group=session.group, async_op=True)
        return Future(name, work, None, lambda: total[:numel].view(shape))

    return execute


def broadcast_start(node: Node, session: Session) -> Execute:
    """The first rank's value, on every rank."""
    group, name, moved = session.group, described(node), session.moved(node)

    def execute(own: torch.Tensor) -> Future:
        if session.lane is None:
            session.enter("broadcast", moved)
        copy = own.clone(memory_format=torch.contiguous_format)
        work = dist.broadcast(copy, dist.get_global_rank(group, 0), group=group, async_op=True)
        return Future(name, work, None, lambda: copy)

    return execute


def wait(node: Node, session: Session) -> Execute:
    """The result of a start, once what computes can see it."""

    def execute(future: Future) -> torch.Tensor | None:
        if isinstance(future.work, Copy):
            future.work.wait()
        elif future.work is not None:
            session.peers.wait(future.work, future.name)
        future.held = future.work = None
        return future.finish()

    return execute


def pack(node: Node, session: Session) -> Execute:
    """One bucket of several tensors. Shards that are adjacent already are not copied."""
    kinds = [v.tensor for v in node.operands]
    layout = bucket_layout(kinds, session.num_shards)
    if kinds[0].is_sharded:

        def join(*chunks: torch.Tensor) -> torch.Tensor:
            joined = _side_by_side(chunks, layout)
            return _concatenated(chunks, layout) if joined is None else joined

        return join
    fillers = [_filler(k, session.num_shards) for k in kinds]
    place = _place(node)

    def execute(*tensors: torch.Tensor, arena: torch.Tensor | None = None) -> torch.Tensor:
        if arena is None:
            bucket = tensors[0].new_zeros(session.num_shards, layout.part_numel)
        else:
            numel = session.num_shards * layout.part_numel
            bucket = place(arena, 0, numel, tensors[0].dtype).zero_().view(session.num_shards, layout.part_numel)
        for tensor, offset, chunk, fill in zip(tensors, layout.offsets, layout.chunks, fillers, strict=True):
            fill(bucket[:, offset : offset + chunk], tensor)
        return bucket.view(-1)

    return execute


def unpack(node: Node, session: Session) -> Execute:
    """The members of a bucket: views of it where it is a rank's part, copies where it is the whole."""
    kinds = [r.tensor for r in node.results]
    layout, num_shards = bucket_layout(kinds, session.num_shards), session.num_shards
    spans = list(zip(layout.offsets, layout.chunks, strict=True))
    if kinds[0].is_sharded:
        return lambda bucket: [bucket[o : o + c] for o, c in spans]
    wanted = [(_numel(k), _shape(k)) for k in kinds]

    def execute(bucket: torch.Tensor) -> list[torch.Tensor]:
        parts = bucket.view(num_shards, -1)
        return [
            parts[:, offset : offset + chunk].reshape(-1)[:numel].view(shape)
            for (offset, chunk), (numel, shape) in zip(spans, wanted, strict=True)
        ]

    return execute


def cast(node: Node, session: Session) -> Execute:
    dtype = node.option("dtype")
    assert isinstance(dtype, DType)
    wanted = TO_TORCH[dtype]
    return lambda tensor: tensor.to(wanted, memory_format=torch.contiguous_format)


def copy(node: Node, session: Session) -> Execute:
    return lambda tensor: tensor.clone(memory_format=torch.contiguous_format)


def accumulate(node: Node, session: Session) -> Execute:
    target = node.option("target")
    assert isinstance(target, str)
    slot = session.store.slots[target]
    return lambda gradient: with_unreduced(session, slot, gradient)


def _along_axis_or(make: Callable[[Node, Session], Execute]) -> Callable[[Node, Session], Execute]:
    """A maker of starts of one kind: along the model axis that a node names, or else among the data ranks."""

    def maker(node: Node, session: Session) -> Execute:
        return make(node, session) if node.option("axis") is None else EXCHANGES[node.op](node, session)

    return maker


EXECUTORS: Mapping[str, Callable[[Node, Session], Execute]] = {
    "all_gather_start": _along_axis_or(all_gather_start),
    "reduce_scatter_start": _along_axis_or(reduce_scatter_start),
    "all_reduce_start": _along_axis_or(all_reduce_start),
    "broadcast_start": broadcast_start,
    "all_to_all_start": _along_axis_or(coded.exchange),
    **coded.EXECUTORS,
    "slice": slice_,
    "first_rank": first_rank,
    **dict.fromkeys(PARTS.values(), ranked),
    **dict.fromkeys(RING.values(), ring_attention),
    **dict.fromkeys(ROUTED.values(), routed),
    "offload_start": offload_start,
    "reload_start": reload_start,
    "wait": wait,
    "pack": pack,
    "unpack": unpack,
    "cast": cast,
    **dict.fromkeys(float8.PARTS, lambda node, session: float8.runs(node)),
    "copy": copy,
    "accumulate": accumulate,
}
"""`release` has none: the executor drops the value, and with its last reference goes the memory. Nor has `pending`:
plans have none of it.
"""


def _op(placement: Placement) -> dist.ReduceOp.RedOpType:
    """The reduction along an axis: a sum for `Partial("sum")`, else an average, also of ranks that hold the same."""
    return dist.ReduceOp.SUM if placement == Partial("sum") else dist.ReduceOp.AVG


def _shape(kind: TensorType) -> tuple[int, ...]:
    return tuple(int(d) for d in kind.shape)


def _numel(kind: TensorType) -> int:
    return int(kind.numel)


def _filler(kind: TensorType, num_ranks: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Writes a tensor into its columns of a bucket, one row a rank. What is padding there must be zero already."""

    def fill_evenly(columns: torch.Tensor, tensor: torch.Tensor) -> None:
        columns.copy_(tensor.reshape(num_ranks, -1))

    def fill(columns: torch.Tensor, tensor: torch.Tensor) -> None:
        flat, chunk = tensor.reshape(-1), columns.shape[1]
        for row, piece in zip(columns, torch.split(flat, chunk), strict=False):
            row[: piece.numel()].copy_(piece)

    return fill_evenly if is_even(kind.shape, num_ranks) else fill


def _padder(kind: TensorType, num_ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor as one dimension with room for equal chunks; no copy where it is dense and divides."""
    if is_even(kind.shape, num_ranks):
        return lambda tensor: tensor.reshape(-1)
    fill = _filler(kind, num_ranks)
    (chunk,) = bucket_layout([kind], num_ranks).chunks

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        padded = tensor.new_zeros(num_ranks, chunk)
        fill(padded, tensor)
        return padded.view(-1)

    return pad


def _side_by_side(chunks: tuple[torch.Tensor, ...], layout: BucketLayout) -> torch.Tensor | None:
    """The chunks as one view, if they have the bucket's layout in memory."""
    first = chunks[0]
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for chunk, offset in zip(chunks, layout.offsets, strict=True):
        if chunk.untyped_storage().data_ptr() != storage or chunk.storage_offset() != start + offset:
            return None
    return first.as_strided((layout.part_numel,), (1,), start)


def _concatenated(chunks: tuple[torch.Tensor, ...], layout: BucketLayout) -> torch.Tensor:
    part = chunks[0].new_zeros(layout.part_numel)
    for chunk, offset in zip(chunks, layout.offsets, strict=True):
        part[offset : offset + chunk.numel()].copy_(chunk)
    return part


def exchange(kind: str, session: Session, numel: int, count: int) -> Callable[[], None]:
    """Collectives of a whole of `numel` fp32 numbers each, one behind the other.

    On processors it returns when all are over; on a GPU its stream waits for them, and not the host.

    Args:
        kind: all_gather, reduce_scatter, all_reduce or broadcast.
        session: whose ranks take part.
        numel: divided evenly over the ranks, rounded down.
        count: how many.
    """
    num_parts = session.num_shards if kind in ("all_gather", "reduce_scatter") else session.num_ranks
    lane = session.lane
    whole = torch.zeros(num_parts, numel // num_parts, device=session.device)
    own = torch.zeros(numel // num_parts, device=session.device)

    def start() -> Work:
        if kind == "all_gather":
            if lane is not None:
                return lane.all_gather((whole.unbind(), own))
            return private_runtime.all_gathers([(whole.view(-1), own)], session.shard_group)
        if kind == "reduce_scatter":
            if lane is not None:
                return lane.reduce_scatter(whole.unbind())
            return private_runtime.reduce_scatters([(own, whole.view(-1))], session.shard_group, session.copy_group)
        if kind == "broadcast":
            sent: dist.Work = dist.broadcast(whole, dist.get_global_rank(session.group, 0), session.group, True)
            return sent
        if lane is not None:
            return lane.all_reduce(whole.unbind())
        work: dist.Work = dist.all_reduce(whole, group=session.group, async_op=True)
        return work

    def run() -> None:
        for work in [start() for _ in range(count)]:
            session.peers.wait(work, kind)

    return run
