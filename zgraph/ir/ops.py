"""The table of zgraph's own ops: one row an op, everything that the rest of the compiler asks about it.

Type rules are in `zgraph.ir.type_rules`. Ops of others are not here: a graph declares those it uses, with effects
read off their schemas (`graph.ExternalOp`); what is known of them by name is in `zgraph.ir.external_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from zgraph.ir import coded_rules, float8_rules, type_rules
from zgraph.ir.axis_rules import axis_of, moved_along
from zgraph.ir.graph import Graph, Node, Value, values_in
from zgraph.ir.layout import chunk_numel, concrete, is_even
from zgraph.ir.op_rows import Op, Transfer
from zgraph.ir.ranked_rows import RANKED
from zgraph.ir.routed_types import ROUTED_DOCS, routed, routed_bytes
from zgraph.ir.type_rules import tensor
from zgraph.ir.types import (
    DEVICE,
    HOST,
    Mesh,
    Shard,
    TensorType,
    Type,
    num_data_ranks,
    num_shards,
)


def padded_bytes(kind: TensorType, num_parts: int) -> int:
    """Bytes of the whole tensor cut into chunks that are padded to the same size."""
    return chunk_numel(kind.shape, num_parts) * num_parts * kind.dtype.itemsize


def moved_bytes(node: Node, mesh: Mesh) -> int:
    """Bytes of the whole of what a collective moves, padding counted; whole along its axis, where it has one."""
    if node.op in ROUTED_DOCS:
        return routed_bytes(node)
    if node.option("axis") is not None:
        index, size = axis_of(node, mesh)
        kind = tensor(node)
        times = size if isinstance(kind.placement[index], Shard) else 1
        return math.prod(map(concrete, kind.shape)) * times * kind.dtype.itemsize
    num_parts = num_chunks(node, mesh) or num_shards(mesh)
    return sum(padded_bytes(tensor(node, i), num_parts) for i in range(len(node.operands)))


def is_copied(node: Node, value: Value, mesh: Mesh) -> bool:
    """Whether a start cannot send an operand as it lies: it scatters, and this is not dense, or needs padding."""
    moves, kind = transfer(node), value.type
    if moves is None or not moves.scatters or not isinstance(kind, TensorType):
        return False
    return kind.strides is not None or not is_even(kind.shape, num_shards(mesh))


def _axis_sends(node: Node, mesh: Mesh) -> int:
    """Bytes that each rank of a model axis sends: those of a ring, or of an all-to-all all but its own."""
    whole, (_, size) = moved_bytes(node, mesh), axis_of(node, mesh)
    if node.op == "all_to_all_start" or node.op in ROUTED_DOCS:
        return _part(whole // size, size)
    return (2 if node.op == "all_reduce_start" else 1) * _part(whole, size)


def _axis_lands(node: Node, mesh: Mesh) -> int:
    """Room for the parts of all ranks of a model axis before they are put together, or summed."""
    return moved_bytes(node, mesh)


def _routed_lands(node: Node, mesh: Mesh) -> int:
    """Room for the rows that a rank sends, and for those that it is sent: on one side those of a part, on the other at
    most all.
    """
    whole, (_, size) = moved_bytes(node, mesh), axis_of(node, mesh)
    return whole + whole // size


def _part(num_bytes: int, num_parts: int) -> int:
    """(N - 1) / N of it: what a ring all-gather or reduce-scatter sends from each rank."""
    return num_bytes // num_parts * (num_parts - 1)


def _gather_sends(node: Node, mesh: Mesh) -> int:
    if node.option("axis") is not None:
        return _axis_sends(node, mesh)
    return _part(coded_rules.expected_bytes(node, mesh) or moved_bytes(node, mesh), num_shards(mesh))


def _scatter_sends(node: Node, mesh: Mesh) -> int:
    """To the ranks of this one's shard axis, and the sums to those that hold the same shard."""
    if node.option("axis") is not None:
        return _axis_sends(node, mesh)
    whole, count = moved_bytes(node, mesh), num_shards(mesh)
    return _part(whole, count) + 2 * _part(whole // count, coded_rules.num_copies(mesh))


def _exchange_sends(node: Node, mesh: Mesh) -> int:
    """To each other rank its part, or the codes of its part."""
    is_along = node.option("axis") is not None
    return _axis_sends(node, mesh) if is_along else _part(concrete(tensor(node).shape[1]), num_shards(mesh))


def _inner_sends(node: Node, mesh: Mesh) -> int:
    """To each other rank of the shard axis its chunk."""
    return _part(moved_bytes(node, mesh), num_shards(mesh))


def _inner_lands(node: Node, mesh: Mesh) -> int:
    """Room for what the ranks of the shard axis send of one chunk, until it is summed."""
    return moved_bytes(node, mesh)


def outer_bytes(node: Node, mesh: Mesh) -> int:
    """Bytes of the codes that all ranks with the same shard have together, before they are exchanged or gathered."""
    return moved_bytes(node, mesh) // num_shards(mesh) * coded_rules.num_copies(mesh)


def _outer_exchange_sends(node: Node, mesh: Mesh) -> int:
    """To each other rank that holds the same shard the code of its part."""
    return _part(moved_bytes(node, mesh) // num_shards(mesh), coded_rules.num_copies(mesh))


def _outer_gather_sends(node: Node, mesh: Mesh) -> int:
    """To each other rank that holds the same shard the code of this one's part."""
    return _part(outer_bytes(node, mesh), coded_rules.num_copies(mesh))


def _exchanged(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    return moved_along(node, mesh) if node.option("axis") is not None else coded_rules.exchanged(node, mesh)


def _share_sends(node: Node, mesh: Mesh) -> int:
    if node.option("axis") is not None:
        return _axis_sends(node, mesh)
    return (2 if node.op == "all_reduce_start" else 1) * _part(moved_bytes(node, mesh), num_data_ranks(mesh))


def _scatter_lands(node: Node, mesh: Mesh) -> int:
    """Room for what all peers but one send of one chunk, until it is summed; and for sums of others that hold it."""
    if node.option("axis") is not None:
        return _axis_lands(node, mesh)
    chunk = moved_bytes(node, mesh) // num_shards(mesh)
    return max(num_shards(mesh) - 2, 0) * chunk + (chunk if num_data_ranks(mesh) > num_shards(mesh) else 0)


def _share_lands(node: Node, mesh: Mesh) -> int:
    """Room for what all peers send of one chunk, until it is summed."""
    if node.option("axis") is not None:
        return _axis_lands(node, mesh)
    return _part(moved_bytes(node, mesh), num_data_ranks(mesh))


def _staged(node: Node, mesh: Mesh) -> int:
    """Shards that are on the host go to the device first."""
    if node.option("axis") is not None:
        return _axis_lands(node, mesh)
    return moved_bytes(node, mesh) // num_shards(mesh) if tensor(node).is_on_host else 0


def _is_sharded(node: Node) -> bool:
    return tensor(node).is_sharded


ROUTED_TRANSFER = Transfer("all_to_all", exchanges=True)

_ROWS = (
    Op(
        "reshard",
        "Change the placement or the memory space of values; a lowering pass decides how.",
        type_rules.resharded,
    ),
    Op(
        "all_gather_start",
        "Begin to collect the shards of all ranks into the whole tensor.",
        type_rules.gathered,
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
        type_rules.scattered,
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
        type_rules.all_reduced,
        "comm",
        _share_sends,
        scratch_bytes=_share_lands,
        pure=False,
        transfer=Transfer("all_reduce", reduces=True, is_shared=True),
        chunks=num_data_ranks,
        kind="reduce",
    ),
    Op(
        "broadcast_start",
        "Begin to copy the first rank's value to every rank.",
        type_rules.broadcast,
        "comm",
        _share_sends,
        pure=False,
        transfer=Transfer("broadcast", reduces=True, is_shared=True),
        kind="reduce",
    ),
    Op(
        "all_to_all_start",
        "Begin to cut a value along another dim: each rank sends every other one its part of this one's part.",
        _exchanged,
        "comm",
        _exchange_sends,
        scratch_bytes=lambda node, mesh: _axis_lands(node, mesh) if node.option("axis") is not None else 0,
        pure=False,
        transfer=Transfer("all_to_all", holds=True),
        kind="gather",
    ),
    Op(
        "inner_reduce_scatter_start",
        "Begin to sum or average over the ranks of the shard axis alone, each rank keeping its shard.",
        coded_rules.scattered_inside,
        "comm",
        _inner_sends,
        scratch_bytes=_inner_lands,
        pure=False,
        transfer=Transfer("reduce_scatter", reduces=True, holds=True, scatters=True),
        kind="reduce",
    ),
    Op(
        "outer_all_to_all_start",
        "Begin to send every rank that holds the same shard the code of its part.",
        coded_rules.exchanged_outside,
        "comm",
        _outer_exchange_sends,
        pure=False,
        transfer=Transfer("all_to_all", holds=True),
        kind="gather",
    ),
    Op(
        "outer_all_gather_start",
        "Begin to collect the codes of all parts of a shard from the ranks that hold it.",
        coded_rules.gathered_outside,
        "comm",
        _outer_gather_sends,
        pure=False,
        transfer=Transfer("all_gather", holds=True),
        kind="gather",
    ),
    *(
        Op(name, doc, routed, "comm", _axis_sends, _routed_lands, pure=False, transfer=ROUTED_TRANSFER, kind="gather")
        for name, doc in ROUTED_DOCS.items()
    ),
    Op(
        "slice",
        "Keep this rank's part of what is replicated along a model axis, in new memory.",
        moved_along,
        recomputable=True,
        is_work=True,
    ),
    Op(
        "first_rank",
        "Make a sum over a model axis of what is replicated along it: zeros on all ranks but the first.",
        moved_along,
        recomputable=True,
        is_work=True,
    ),
    *RANKED,
    Op(
        "offload_start",
        "Begin to copy a value from the device to its host.",
        type_rules.copied_to(HOST),
        "d2h",
        pure=False,
        transfer=Transfer("offload", holds=True),
        kind="copy",
    ),
    Op(
        "reload_start",
        "Begin to copy a value from the host to its device.",
        type_rules.copied_to(DEVICE),
        "h2d",
        pure=False,
        transfer=Transfer("reload", brings=True, holds=True),
        lies_in_arena=True,
        kind="copy",
    ),
    Op("wait", "Deliver what a start promised.", type_rules.waited, views=lambda node: True, pure=False, kind="wait"),
    Op(
        "pack",
        "Lay tensors out as one bucket: chunk r of it is chunk r of each, one after the other.",
        type_rules.packed,
        lies_in_arena=True,
        prepares=True,
        is_work=True,
    ),
    Op("unpack", "Take a bucket apart again.", type_rules.unpacked, views=_is_sharded, chunks=num_shards, is_work=True),
    Op("cast", "Change the dtype.", type_rules.cast, recomputable=True, prepares=True, is_work=True),
    Op("amax", "Find the largest magnitude of each rank's part.", float8_rules.amax, recomputable=True, is_work=True),
    Op("float8_scale", "Make the scale of a whole of the largest magnitudes of its parts.", float8_rules.scale),
    Op(
        "float8_cast",
        "Cast each rank's part to float8 with the scale of the whole.",
        float8_rules.cast,
        scratch_bytes=float8_rules.cast_bytes,
        recomputable=True,
        prepares=True,
        is_work=True,
    ),
    Op(
        "encode",
        "Code numbers by a codec, with what earlier codes left out added, and keep what this one leaves out.",
        coded_rules.encoded,
        pure=False,
        prepares=True,
        is_work=True,
    ),
    Op(
        "decode",
        "Make numbers of codes; of the codes of all ranks their sum or mean, in fp32.",
        coded_rules.decoded,
        is_work=True,
    ),
    Op(
        "copy",
        "A dense copy in new memory; of a replicated value each rank may take its own.",
        type_rules.copied,
        is_work=True,
    ),
    Op(
        "pending",
        "Say what the ranks' own values are together: their sum or mean, or the first rank's.",
        type_rules.stated,
        views=lambda node: True,
        prepares=True,
    ),
    Op(
        "accumulate",
        "Add the gradients that backwards under no_sync left on this rank for the parameter `target`.",
        type_rules.accumulated,
        views=lambda node: True,
        pure=False,
    ),
    Op(
        "release",
        "End the life of a value: its memory is free from here on.",
        type_rules.released,
        pure=False,
        consumes=True,
        kind="wait",
    ),
)

OPS: Mapping[str, Op] = {op.name: op for op in _ROWS}


ALONG_AXIS: Mapping[str, Transfer] = {
    f"{name}_start": Transfer(name, exchanges=True)
    for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
} | dict.fromkeys(ROUTED_DOCS, ROUTED_TRANSFER)
"""Transfers along a model axis, by the op that begins them: each sends a copy."""


def transfer(node: Node) -> Transfer | None:
    """Transfer that a start begins; None for all other nodes."""
    if node.op in ALONG_AXIS and node.option("axis") is not None:
        return ALONG_AXIS[node.op]
    row = OPS.get(node.op)
    return row.transfer if row is not None else None


def brings(node: Node) -> bool:
    """Whether a start gathers, or brings back from the host."""
    moves = transfer(node)
    return moves is not None and moves.brings


def num_chunks(node: Node, mesh: Mesh) -> int:
    """Into how many chunks of one size what a node makes whole is cut; 0 where it takes as much as it has."""
    row = OPS.get(node.op)
    if row is None or row.chunks is None or node.option("axis") is not None:
        return 0
    return row.chunks(mesh)


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
