"""Bytes that lie at rest between steps, from the inputs of a graph and where they are placed."""

from __future__ import annotations

from zgraph.cost.memory import local_bytes
from zgraph.ir import Graph, InputKind, TensorType

UPDATE_PASSES = 7
"""How often AdamW's update goes over memory as large as the masters: it reads four tensors and writes three."""


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
