"""The table of zgraph's own ops: one row an op, everything that the rest of the compiler asks about it.

ATen ops are not here: a graph declares those it uses, with the effects read off their schemas (`graph.ExternalOp`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from zgraph.ir.graph import Graph, Node, Value, values_in
from zgraph.ir.layout import bucket_layout, chunk_numel, is_even
from zgraph.ir.types import (
    DEVICE,
    HOST,
    REDUCTIONS,
    DType,
    Mesh,
    Partial,
    Placement,
    Reduction,
    Replicate,
    Shard,
    TensorType,
    Type,
    Varying,
    num_ranks,
    num_shards,
)

Lane = Literal["compute", "comm", "d2h", "h2d"]
"""Lane that runs an op: computing, the network, or copies from the device to its host and back."""

LANES: tuple[Lane, ...] = get_args(Lane)

TypeRule = Callable[[Node, Mesh], tuple[Type, ...]]


class TypeRuleError(ValueError):
    """The operands of an op do not fit it."""


Kind = Literal["gather", "reduce", "copy", "wait", "place"]
"""How a report draws an op: colour and glyph."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Transfer that a start begins: a collective, or a copy between the device and its host.

    Args:
        name: its name in cost tables and profiles: `all_gather`, `offload`, ...
        brings: an op needs what it delivers, in memory that is released after its last use. The others take away what
            no op needs any more.
        reduces: it sums or averages over the ranks, or takes the first rank's.
        holds: it reads its operand until it is waited for; the others copy it first.
        scatters: each rank keeps a part of the result. If the operand is not dense, or needs padding, a copy of it is
            sent.
        is_shared: all ranks take part in it as equals, whatever the mesh.
    """

    name: str
    brings: bool = False
    reduces: bool = False
    holds: bool = False
    scatters: bool = False
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One row.

    Args:
        name: the op's name in text.
        doc: one line of what it does.
        rule: from a node and the mesh to the types its results must have; raises TypeRuleError.
        lane: which lane runs it.
        wire_bytes: bytes this rank sends, from a node and the mesh.
        scratch_bytes: bytes it needs beside operands and results while it runs.
        views: whether its results share memory with its operands.
        pure: running it has no effect but its results, the same each time.
        consumes: it ends the life of its operands.
        recomputable: it may be run again instead of keeping its result.
        transfer: what a start moves; None for all other ops.
        chunks: into how many chunks of one size its whole results are cut, from the mesh; None where into none.
        lies_in_arena: whether its results may have fixed places in an arena.
        prepares: whether it only prepares a start, where nothing else reads what it makes.
        is_work: whether it reads and writes the memory of its operands and results, on the compute lane.
        kind: how a report draws it.
    """

    name: str
    doc: str
    rule: TypeRule
    lane: Lane = "compute"
    wire_bytes: Callable[[Node, Mesh], int] = lambda node, mesh: 0
    scratch_bytes: Callable[[Node, Mesh], int] = lambda node, mesh: 0
    views: Callable[[Node], bool] = lambda node: False
    pure: bool = True
    consumes: bool = False
    recomputable: bool = False
    transfer: Transfer | None = None
    chunks: Callable[[Mesh], int] | None = None
    lies_in_arena: bool = False
    prepares: bool = False
    is_work: bool = False
    kind: Kind = "place"


def tensor(node: Node, index: int = 0) -> TensorType:
    """The tensor type of the node's operand number `index`."""
    found = node.operands[index].type
    if not isinstance(found, TensorType):
        raise TypeRuleError(f"operand {index} is {found}, not a tensor")
    return found


def _one(node: Node) -> TensorType:
    if len(node.operands) != 1:
        raise TypeRuleError(f"takes one operand, not {len(node.operands)}")
    return tensor(node)


def _moved(node: Node, change: Callable[[TensorType], TensorType]) -> tuple[Type, ...]:
    """Result types of a collective: a future for each operand, with the placement that `change` gives it."""
    if not node.operands:
        raise TypeRuleError("takes one operand or more")
    kinds = [tensor(node, i) for i in range(len(node.operands))]
    if len({(k.dtype, k.placement) for k in kinds}) > 1:
        raise TypeRuleError("moves tensors of one dtype and one placement")
    return tuple(change(k).contiguous().promised() for k in kinds)


def _sharded(kind: TensorType) -> TensorType:
    """The operand of a gather."""
    if kind.future or not kind.placement or kind.placement[-1] != Shard(0):
        raise TypeRuleError(f"its operand must be sharded on dim 0 along the last axis, not {kind}")
    return kind


def _pending(kind: TensorType, *reductions: Reduction) -> TensorType:
    """The operand of a reduction: it is pending along the last axis, and along others in the same way or replicated."""
    is_whole = all(isinstance(p, Partial | Replicate) for p in kind.placement)
    last = kind.placement[-1] if kind.placement else None
    if kind.future or not is_whole or not isinstance(last, Partial) or kind.reduction not in reductions:
        names = " or ".join(str(Partial(r)) for r in reductions)
        remedy = "; say with pending what the ranks' own values are together" if kind.varies else ""
        raise TypeRuleError(f"its operand must be placed {names} along each axis that it reduces, not {kind}{remedy}")
    return kind


def padded_bytes(kind: TensorType, num_parts: int) -> int:
    """Bytes of the whole tensor cut into chunks that are padded to the same size."""
    return chunk_numel(kind.shape, num_parts) * num_parts * kind.dtype.itemsize


def moved_bytes(node: Node, mesh: Mesh) -> int:
    """Bytes of the whole of what a collective moves, padding counted."""
    num_parts = num_chunks(node, mesh) or num_shards(mesh)
    return sum(padded_bytes(tensor(node, i), num_parts) for i in range(len(node.operands)))


def _gathered(node: Node, _: Mesh) -> tuple[Type, ...]:
    """Onto the device, from wherever the shards lie."""
    return _moved(node, lambda kind: _whole(_sharded(kind)).on(DEVICE))


def _whole(kind: TensorType) -> TensorType:
    """A sharded tensor, gathered."""
    return kind.at(*kind.placement[:-1], Replicate())


def _part_of(kind: TensorType) -> TensorType:
    """A pending tensor, reduced and sharded."""
    return kind.at(*kind.reduced().placement[:-1], Shard(0))


def _scattered(node: Node, _: Mesh) -> tuple[Type, ...]:
    return _moved(node, lambda kind: _part_of(_pending(kind, "sum", "mean")))


def _all_reduced(node: Node, _: Mesh) -> tuple[Type, ...]:
    return _moved(node, lambda kind: _pending(kind, "sum", "mean").reduced())


def _broadcast(node: Node, _: Mesh) -> tuple[Type, ...]:
    return _moved(node, lambda kind: _pending(kind, "root").reduced())


def _copied_to(space: str) -> TypeRule:
    """The operand, whole as it lies, in another memory space."""

    def rule(node: Node, _: Mesh) -> tuple[Type, ...]:
        kind = _one(node)
        if kind.future or kind.space == space:
            raise TypeRuleError(f"copies to the {space} what does not lie there, not {kind}")
        return (kind.on(space).promised(),)

    return rule


def _waited(node: Node, _: Mesh) -> tuple[Type, ...]:
    kind = _one(node)
    if not kind.future:
        raise TypeRuleError(f"waits for a future, not for {kind}")
    return (kind.delivered(),)


def _resharded(node: Node, _: Mesh) -> tuple[Type, ...]:
    """Result types of a reshard: shards become whole, pending values are reduced, the memory space may change. All else
    stays."""
    if node.option("reduce") is not None:
        raise TypeRuleError("takes no reduce=: what is pending is in the type of its operand")
    results = []
    for value, result in zip(node.operands, node.results, strict=True):
        kind, made = tensor(replace(node, args=(value,), kwargs=())), result.type
        if not isinstance(made, TensorType) or (kind.placement, kind.space) == (made.placement, made.space):
            raise TypeRuleError(f"must change the placement or the memory space of %{value.name}")
        same = kind
        if kind.placement != made.placement:
            if made.placement not in (ways := _ways(kind)):
                names = " or ".join(str(kind.contiguous().at(*way)) for way in ways)
                raise TypeRuleError(f"makes {names} of %{value.name}, not {made}")
            same = kind.contiguous()
        results.append(same.at(*made.placement).on(made.space))
    return tuple(results)


def _ways(kind: TensorType) -> tuple[tuple[Placement, ...], ...]:
    """The placements that there is a collective to."""
    if kind.is_sharded:
        return (_whole(kind).placement,)
    reduced = _pending(kind, *REDUCTIONS).reduced().placement
    return (reduced,) if kind.reduction == "root" else (reduced, _part_of(kind).placement)


def _packed(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    kinds = [tensor(node, i) for i in range(len(node.operands))]
    if len({(k.dtype, k.placement, k.space) for k in kinds}) != 1:
        raise TypeRuleError("packs tensors of one dtype, one placement and one memory space")
    numel = bucket_layout(kinds, num_shards(mesh)).part_numel * num_shards(mesh)
    return (TensorType(kinds[0].dtype, (numel,), placement=kinds[0].placement, space=kinds[0].space),)


def _unpacked(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    flat = _one(node)
    members = [r.type for r in node.results if isinstance(r.type, TensorType)]
    if len(members) != len(node.results) or any(m.dtype is not flat.dtype for m in members):
        raise TypeRuleError(f"unpacks into tensors of {flat.dtype.value}")
    if bucket_layout(members, num_shards(mesh)).part_numel * num_shards(mesh) != flat.numel:
        raise TypeRuleError("its results do not fill its operand")
    return tuple(m.contiguous().at(*flat.placement).on(flat.space) for m in members)


def _cast(node: Node, _: Mesh) -> tuple[Type, ...]:
    dtype = node.option("dtype")
    if not isinstance(dtype, DType):
        raise TypeRuleError("needs dtype=")
    return (_one(node).contiguous(dtype),)


def _copied(node: Node, _: Mesh) -> tuple[Type, ...]:
    kind = _one(node).contiguous()
    made = node.results[0].type if node.results else kind
    if isinstance(made, TensorType) and made.varies and all(isinstance(p, Replicate) for p in kind.placement):
        return (kind.at(*(Varying() for _ in kind.placement)),)
    return (kind,)


def _accumulated(node: Node, _: Mesh) -> tuple[Type, ...]:
    if not isinstance(node.option("target"), str):
        raise TypeRuleError("needs target=, the name of the parameter")
    return (_pending(_one(node), "sum", "mean"),)


def _stated(node: Node, _: Mesh) -> tuple[Type, ...]:
    kind, reduction = _one(node), next((r for r in REDUCTIONS if r == node.option("reduce")), None)
    if reduction is None:
        raise TypeRuleError(f"needs reduce=, one of {', '.join(REDUCTIONS)}")
    if kind.future or not kind.varies:
        raise TypeRuleError(f"says what values of the ranks' own are together, and {kind} is none")
    return (kind.at(*(Partial(reduction) if isinstance(p, Varying) else p for p in kind.placement)),)


def _released(node: Node, _: Mesh) -> tuple[Type, ...]:
    _one(node)
    return ()


def is_copied(node: Node, value: Value, mesh: Mesh) -> bool:
    """Whether a start cannot send an operand as it lies: it scatters, and this is not dense, or needs padding."""
    moves, kind = transfer(node), value.type
    if moves is None or not moves.scatters or not isinstance(kind, TensorType):
        return False
    return kind.strides is not None or not is_even(kind.shape, num_shards(mesh))


def _part(num_bytes: int, num_parts: int) -> int:
    """(N - 1) / N of it: what a ring all-gather or reduce-scatter sends from each rank."""
    return num_bytes // num_parts * (num_parts - 1)


def _gather_sends(node: Node, mesh: Mesh) -> int:
    return _part(moved_bytes(node, mesh), num_shards(mesh))


def _scatter_sends(node: Node, mesh: Mesh) -> int:
    """To the ranks of this one's shard axis, and the sums to those that hold the same shard."""
    whole, count = moved_bytes(node, mesh), num_shards(mesh)
    return _part(whole, count) + 2 * _part(whole // count, num_ranks(mesh) // count)


def _share_sends(node: Node, mesh: Mesh) -> int:
    return (2 if node.op == "all_reduce_start" else 1) * _part(moved_bytes(node, mesh), num_ranks(mesh))


def _scatter_lands(node: Node, mesh: Mesh) -> int:
    """Room for what all peers but one send of one chunk, until it is summed; and for sums of others that hold it."""
    chunk = moved_bytes(node, mesh) // num_shards(mesh)
    return max(num_shards(mesh) - 2, 0) * chunk + (chunk if num_ranks(mesh) > num_shards(mesh) else 0)


def _share_lands(node: Node, mesh: Mesh) -> int:
    """Room for what all peers send of one chunk, until it is summed."""
    return _part(moved_bytes(node, mesh), num_ranks(mesh))


def _staged(node: Node, mesh: Mesh) -> int:
    """Shards that are on the host go to the device first."""
    return moved_bytes(node, mesh) // num_shards(mesh) if tensor(node).is_on_host else 0


def _is_sharded(node: Node) -> bool:
    return tensor(node).is_sharded


_ROWS = (
    Op("reshard", "Change the placement or the memory space of values; a lowering pass decides how.", _resharded),
    Op(
        "all_gather_start",
        "Begin to collect the shards of all ranks into the whole tensor.",
        _gathered,
        "comm",
        _gather_sends,
        scratch_bytes=_staged,
        pure=False,
        transfer=Transfer("all_gather", brings=True, holds=True),
        chunks=num_shards,
        lies_in_arena=True,
        kind="gather",
    ),
    Op(
        "reduce_scatter_start",
        "Begin to sum or average over the ranks, each rank keeping its shard.",
        _scattered,
        "comm",
        _scatter_sends,
        scratch_bytes=_scatter_lands,
        pure=False,
        transfer=Transfer("reduce_scatter", reduces=True, holds=True, scatters=True),
        kind="reduce",
    ),
    Op(
        "all_reduce_start",
        "Begin to sum or average over the ranks, every rank keeping the whole.",
        _all_reduced,
        "comm",
        _share_sends,
        scratch_bytes=_share_lands,
        pure=False,
        transfer=Transfer("all_reduce", reduces=True, is_shared=True),
        chunks=num_ranks,
        kind="reduce",
    ),
    Op(
        "broadcast_start",
        "Begin to copy the first rank's value to every rank.",
        _broadcast,
        "comm",
        _share_sends,
        pure=False,
        transfer=Transfer("broadcast", reduces=True, is_shared=True),
        kind="reduce",
    ),
    Op(
        "offload_start",
        "Begin to copy a value from the device to its host.",
        _copied_to(HOST),
        "d2h",
        pure=False,
        transfer=Transfer("offload", holds=True),
        kind="copy",
    ),
    Op(
        "reload_start",
        "Begin to copy a value from the host to its device.",
        _copied_to(DEVICE),
        "h2d",
        pure=False,
        transfer=Transfer("reload", brings=True, holds=True),
        lies_in_arena=True,
        kind="copy",
    ),
    Op("wait", "Deliver what a start promised.", _waited, views=lambda node: True, pure=False, kind="wait"),
    Op(
        "pack",
        "Lay tensors out as one bucket: chunk r of it is chunk r of each, one after the other.",
        _packed,
        lies_in_arena=True,
        prepares=True,
        is_work=True,
    ),
    Op("unpack", "Take a bucket apart again.", _unpacked, views=_is_sharded, chunks=num_shards, is_work=True),
    Op("cast", "Change the dtype.", _cast, recomputable=True, prepares=True, is_work=True),
    Op("copy", "A dense copy in new memory; of a replicated value each rank may take its own.", _copied, is_work=True),
    Op(
        "pending",
        "Say what the ranks' own values are together: their sum or mean, or the first rank's.",
        _stated,
        views=lambda node: True,
        prepares=True,
    ),
    Op(
        "accumulate",
        "Add the gradients that backwards under no_sync left on this rank for the parameter `target`.",
        _accumulated,
        views=lambda node: True,
        pure=False,
    ),
    Op(
        "release",
        "End the life of a value: its memory is free from here on.",
        _released,
        pure=False,
        consumes=True,
        kind="wait",
    ),
)

OPS: Mapping[str, Op] = {op.name: op for op in _ROWS}


def transfer(node: Node) -> Transfer | None:
    """Transfer that a start begins; None for all other nodes."""
    row = OPS.get(node.op)
    return row.transfer if row is not None else None


def brings(node: Node) -> bool:
    """Whether a start gathers, or brings back from the host."""
    moves = transfer(node)
    return moves is not None and moves.brings


def num_chunks(node: Node, mesh: Mesh) -> int:
    """Into how many chunks of one size what a node makes whole is cut; 0 where it takes as much as it has."""
    row = OPS.get(node.op)
    return row.chunks(mesh) if row is not None and row.chunks is not None else 0


def views(graph: Graph, node: Node) -> tuple[str, ...]:
    """Names of the values whose memory the results of `node` may share."""
    if op := OPS.get(node.op):
        return tuple(v.name for v in node.operands) if op.views(node) else ()
    if not (positions := graph.foreign[node.op].views):
        return ()
    found: list[str] = []
    for position in positions:
        arg = node.args[position] if position < len(node.args) else None
        if isinstance(arg, Value):
            found.append(arg.name)
        else:
            found.extend(value.name for value in values_in(arg))
    return tuple(found)


def is_pure(graph: Graph, node: Node) -> bool:
    """Whether running the node has no effect but its results, the same each time."""
    if op := OPS.get(node.op):
        return op.pure
    return graph.foreign[node.op].is_pure
