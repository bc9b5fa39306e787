"""Bytes that lie at rest between steps, from the inputs of a graph and where they are placed."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from zgraph.cost.memory import local_bytes
from zgraph.ir import DType, Graph, InputKind, Phase, TensorType
from zgraph.ir.coded_rules import num_copies
from zgraph.ir.layout import chunk_numel
from zgraph.ir.ops import padded_bytes

UPDATE_PASSES = 7
"""How often AdamW's update goes over memory as large as the masters: it reads four tensors and writes three."""


def update_scratch(placed: Graph) -> int:
    """Bytes that torch's AdamW takes beside gradients on a processor, which takes one parameter after the other: two as
    large as a shard of this rank, and one as large as the shard before it."""
    sizes = [
        local_bytes(i.value.type, placed.mesh, {})
        * (i.master or i.value.tensor.dtype).itemsize
        // i.value.tensor.dtype.itemsize
        for i in placed.params
        if not i.offload
    ]
    return max((2 * size + last for last, size in pairwise([0, *sizes])), default=0)


def feedback_bytes(placed: Graph) -> int:
    """Bytes of this rank that hold what codes of gradients leave out, if the gradients of all parameters are coded: in
    fp32, of its own addend to each, and of its part of those that it keeps whole."""
    count, copies, found = placed.num_shards, num_copies(placed.mesh), 0
    for entry in placed.params if count * copies > 1 else ():
        kind = entry.value.tensor
        chunk = int(chunk_numel(kind.shape, count))
        found += 4 * (chunk + -(-chunk // copies) if copies > 1 else chunk * (count + (not kind.is_sharded)))
    return found


def copies_bytes(placed: Graph, dtypes: Collection[DType], *, with_own: bool) -> int:
    """Bytes of the copies of parameters that all ranks keep for codes of what changes: at stages 1 and 2.

    Args:
        placed: the graph.
        dtypes: those whose numbers the codec codes.
        with_own: whether a rank's part is kept as it was coded, too.
    """
    stages, found = {i.value.name: i.stage for i in placed.params}, 0
    for node in placed.nodes:
        for operand in node.operands if node.op == "reshard" and node.phase is Phase.forward else ():
            maker = placed.producers.get(operand.name)
            source = maker.operands[0].name if maker is not None and maker.op == "cast" else operand.name
            kind = operand.tensor
            if stages.get(source) in (1, 2) and kind.is_sharded and kind.dtype in dtypes:
                found += padded_bytes(kind, placed.num_shards) // placed.num_shards * (placed.num_shards + with_own)
    return found


def at_rest(placed: Graph) -> dict[str, int]:
    """Bytes of this rank: of parameters, AdamW's moments and buffers on the device, of masters, and on the host."""
    found = dict.fromkeys(("parameters", "optimizer", "buffers", "masters", "host"), 0)
    for entry in placed.inputs:
        kind = entry.value.type
        num_bytes = local_bytes(kind, placed.mesh, {})
        if not isinstance(kind, TensorType):
            continue
        if entry.kind is not InputKind.param:
            found["buffers"] += num_bytes if entry.kind in (InputKind.buffer, InputKind.constant) else 0
            continue
        master = entry.master or kind.dtype
        master_bytes = num_bytes * master.itemsize // kind.dtype.itemsize
        found["masters"] += master_bytes
        found["host" if kind.is_on_host else "parameters"] += num_bytes
        found["host" if entry.offload else "optimizer"] += 2 * master_bytes
        if entry.offload and (master is not kind.dtype or not kind.is_on_host):
            found["host"] += master_bytes
    return found
