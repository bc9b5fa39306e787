"""How codes are made, exchanged and decoded on this rank: see `zgraph.ir.coded_rules`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.codecs import decode as decoded
from zgraph.bridge.codecs import encode_into, sum_decoded
from zgraph.bridge.sized_codes import all_same, decode_sized, encode_sized
from zgraph.errors import UsageError
from zgraph.ir import Node
from zgraph.ir.codecs import Difference, Sized
from zgraph.ir.coded_rules import codec_of, outer_numel
from zgraph.ir.layout import bucket_layout, chunk_numel, is_even
from zgraph.runtime.agreement import described
from zgraph.runtime.feedback import Bucket
from zgraph.runtime.futures import Future, Work

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

Execute = Callable[..., Any]


def is_sized(gather: Node) -> bool:
    """Whether a gather is of codes of variable length."""
    return gather.option("codec") is not None and isinstance(codec_of(gather), Sized)


def encode(node: Node, session: Session) -> Execute:
    """The code of this rank's numbers, with the rest of the codes before, and a rest for the next one."""
    if isinstance(codec_of(node), Sized):
        return _encode_sized(node, session)
    codec, kind, num_shards = codec_of(node), node.operands[0].tensor, session.num_shards
    is_part, chunk = kind.reduction is None, chunk_numel(kind.shape, num_shards)
    rows, numel = (1 if is_part else num_shards), int(kind.numel)
    is_padded = not is_part and not is_even(kind.shape, num_shards)
    if kind.is_sharded and not is_part:  # of parts of a shard
        rows, numel, chunk = session.num_copies, chunk, outer_numel(kind, session.store.ranks.axes)
        is_padded = rows * chunk != numel
    names, size = node.option("feedback"), codec.num_bytes(chunk, kind.dtype)
    bucket = Bucket(tuple(map(str, names)), kind.dtype, is_part) if isinstance(names, tuple) else None

    def execute(tensor: torch.Tensor) -> torch.Tensor:
        if is_padded:
            numbers = tensor.new_zeros(rows, chunk)
            numbers.view(-1)[:numel].copy_(tensor.reshape(-1))
        else:
            numbers = tensor.reshape(rows, chunk)
        rest = session.feedback.of(bucket) if bucket is not None else None
        code = torch.empty(rows, size, dtype=torch.uint8, device=tensor.device)
        encode_into(codec, numbers, code, rest)
        if bucket is not None and rest is not None and bucket not in session.feedback.errors:
            session.feedback.errors[bucket] = rest.norm() / numbers.float().norm().clamp(min=1e-30)
        return code.view(-1)

    return execute


def exchange(node: Node, session: Session) -> Execute:
    """From every rank the code of this one's part of what that rank adds."""
    num_shards, name, moved = session.num_shards, described(node), session.moved(node)

    def execute(code: torch.Tensor) -> Future:
        found = torch.empty_like(code)
        if session.lane is not None:
            parts = found.view(num_shards, -1).unbind(), code.view(num_shards, -1).unbind()
            work: Work = session.lane.all_to_all(*parts, moved=moved)
        else:
            session.enter("all-to-all", moved)
            work = dist.all_to_all_single(found, code, group=session.shard_group, async_op=True)
        return Future(name, work, code, lambda: found)

    return execute


def scatter_inside(node: Node, session: Session) -> Execute:
    """This rank's shard of the sum or mean over the ranks of its shard axis."""
    kind, count = node.operands[0].tensor, session.num_shards
    name, moved = described(node), session.moved(node)
    numel, chunk = int(kind.numel), chunk_numel(kind.shape, count)
    divisor, op = (count, dist.ReduceOp.AVG) if kind.reduction == "mean" else (1, dist.ReduceOp.SUM)

    def execute(whole: torch.Tensor) -> Future:
        sent = whole.reshape(-1)
        if numel != count * chunk:
            sent = whole.new_zeros(count * chunk)
            sent[:numel].copy_(whole.reshape(-1))
        if session.lane is not None:
            transfer = session.lane.reduce_inside(sent.view(count, chunk).unbind(), divisor, moved)
            return Future(name, transfer, sent, partial(_first, transfer.result))
        session.enter("reduce-scatter", moved)
        out = sent.new_empty(chunk)
        work = private_runtime.reduce_scatters([(out, sent)], session.shard_group, None, (op, op))
        return Future(name, work, sent, lambda: out)

    return execute


def _first(result: list[torch.Tensor]) -> torch.Tensor:
    return result[0]


def exchange_outside(node: Node, session: Session) -> Execute:
    """From every rank that holds the same shard the code of this one's part of it."""
    name, moved, count = described(node), session.moved(node), session.num_copies

    def execute(code: torch.Tensor) -> Future:
        found = torch.empty_like(code)
        if session.lane is not None:
            work: Work = session.lane.swap_outside(found.view(count, -1).unbind(), code.view(count, -1).unbind(), moved)
        else:
            session.enter("all-to-all", moved)
            work = dist.all_to_all_single(found, code, group=session.copy_group, async_op=True)
        return Future(name, work, code, lambda: found)

    return execute


def gather_outside(node: Node, session: Session) -> Execute:
    """From every rank that holds the same shard the code of its part of it."""
    name, moved, count = described(node), session.moved(node), session.num_copies

    def execute(code: torch.Tensor) -> Future:
        found = code.new_empty(count * code.numel())
        if session.lane is not None:
            work: Work = session.lane.share_outside(found.view(count, -1).unbind(), code, moved)
        else:
            session.enter("all-gather", moved)
            assert session.copy_group is not None, "several ranks hold the shard"
            work = private_runtime.all_gathers([(found, code)], session.copy_group)
        return Future(name, work, code, lambda: found)

    return execute


def decode(node: Node, session: Session) -> Execute:
    """Numbers that codes stand for: the sum or mean over the ranks that made them, in fp32; or each part as it is."""
    codec, kind, num_shards = codec_of(node), node.results[0].tensor, session.num_shards
    if isinstance(codec, Sized):
        return _decode_sized(node, session)
    (chunk,) = bucket_layout([kind], num_shards).chunks
    dtype, shape, numel = TO_TORCH[kind.dtype], [int(d) for d in kind.shape], int(kind.numel)
    total_dtype = dtype if codec.is_exact else torch.float32
    reduce, makers = node.option("reduce"), session.num_copies if kind.is_sharded and kind.varies else num_shards
    divisor = makers if reduce == "mean" else 1

    def reduced(codes: torch.Tensor) -> torch.Tensor:
        total = torch.empty(chunk, dtype=total_dtype, device=codes.device)
        return sum_decoded(codec, codes.view(makers, -1), total, divisor).to(dtype)

    def parts(codes: torch.Tensor) -> torch.Tensor:
        found = decoded(codec, codes.view(num_shards, -1), chunk, total_dtype)
        return found.view(-1)[:numel].view(shape).to(dtype)

    def shard(codes: torch.Tensor) -> torch.Tensor:
        found = decoded(codec, codes.view(session.num_copies, -1), outer, total_dtype)
        return found.view(-1)[:chunk].to(dtype)

    if not reduce and kind.is_sharded:
        outer = outer_numel(kind, session.store.ranks.axes)
        return shard
    return reduced if reduce else parts


def _encode_sized(node: Node, session: Session) -> Execute:
    """The code of this rank's part, in memory for the longest; of what changed since the copy that all ranks have."""
    codec, kind = codec_of(node), node.operands[0].tensor
    assert isinstance(codec, Sized)
    if session.device.type != "cpu":
        raise UsageError(
            f"{codec} codes parameters on processors, and the model is on {session.device}: leave out compress= "
            "or the pass code-gathers"
        )
    names, size = _copied(node), codec.num_bytes(chunk_numel(kind.shape, session.num_shards), kind.dtype)
    copies, shard, is_about = session.copies, session.store.shard, isinstance(codec, Difference)

    def execute(tensor: torch.Tensor) -> torch.Tensor:
        own, code = tensor.detach().reshape(-1), torch.empty(size, dtype=torch.uint8)
        before = copies.of(names, kind.dtype) if names else None
        copies.number_bytes += own.nbytes
        kept = torch.empty_like(own) if is_about else None  # the copy has it but about, and the optimizer writes to it
        if before is None:
            copies.code_bytes += encode_sized(codec, own, code, kept=kept)
        else:
            copies.code_bytes += encode_sized(codec, own, code, before.rows[shard], before.number, before.own, kept)
        if names:
            copies.began(names, before, own if kept is None else kept)
        return code

    return execute


def _decode_sized(node: Node, session: Session) -> Execute:
    """Numbers that the codes of all ranks stand for, the whole; kept, where the next codes are of what changes."""
    codec, kind, names, num_shards = codec_of(node), node.results[0].tensor, _copied(node), session.num_shards
    assert isinstance(codec, Sized)
    is_about = isinstance(codec, Difference)
    dtype, shape, numel = TO_TORCH[kind.dtype], [int(d) for d in kind.shape], int(kind.numel)
    chunk, copies, shard = chunk_numel(kind.shape, num_shards), session.copies, session.store.shard

    def execute(codes: torch.Tensor) -> torch.Tensor:
        by_rank = codes.view(num_shards, -1).unbind()
        before, own = copies.ended(names) if names else (None, None)
        if before is not None and all_same(by_rank, before.number):
            return before.rows.view(-1)[:numel].view(shape)
        with torch.inference_mode(False):  # so that writing to it is seen
            rows = torch.empty(num_shards, chunk, dtype=dtype)
        for rank, (code, row) in enumerate(zip(by_rank, rows, strict=True)):
            if rank == shard and own is not None and not is_about:
                row.copy_(own)
            elif before is None:
                decode_sized(codec, code, row)
            else:
                decode_sized(codec, code, row, before.rows[rank], before.number)
        if names:
            copies.keep(names, kind.dtype, rows, own if is_about else None)
        return rows.view(-1)[:numel].view(shape)

    return execute


def _copied(node: Node) -> tuple[str, ...]:
    """The parameters whose copies a code changes."""
    names = node.option("copies")
    return tuple(map(str, names)) if isinstance(names, tuple) else ()


EXECUTORS: Mapping[str, Callable[[Node, Session], Execute]] = {
    "inner_reduce_scatter_start": scatter_inside,
    "outer_all_to_all_start": exchange_outside,
    "outer_all_gather_start": gather_outside,
    "encode": encode,
    "decode": decode,
}
