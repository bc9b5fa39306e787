"""Memory of a GPU that training takes: what is allocated, what torch's caching allocator reserves for it, and all.

Two are counted apart, as tools do: `torch.cuda.max_memory_allocated` is the first, `max_memory_reserved` the second;
`nvidia-smi` shows the second with the driver's context and NCCL's buffers. A budget in bytes is for what is allocated.
What is reserved must fit the device beside the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zgraph.cost.allocator import Block, CachingAllocator
from zgraph.cost.memory import local_bytes, requests
from zgraph.ir import Graph, InputKind, Plan

NUM_STEPS = 3
"""Steps until an allocator has all that it will have: the optimizer's moments come with the first update."""

CONTEXT_BYTES = 600 << 20
"""Memory of the driver's context and of the kernels that are loaded, in a process with torch and its libraries."""

NCCL_BYTES = 512 << 20
"""Buffers of NCCL: 4 MiB (NCCL_BUFFSIZE) and less for its other protocols, for each of up to 32 channels and peer."""


@dataclass(frozen=True)
class Footprint:
    """Peaks of one rank's device in a training step, in bytes.

    Args:
        allocated_bytes: of blocks in use.
        reserved_bytes: of segments, those of blocks in use and those that are cached.
        beside_bytes: what is not torch's: the driver's context, and NCCL's buffers where ranks communicate.
    """

    allocated_bytes: int
    reserved_bytes: int
    beside_bytes: int

    @property
    def device_bytes(self) -> int:
        """All that the device has taken, as `nvidia-smi` shows it."""
        return self.reserved_bytes + self.beside_bytes

    @property
    def fragmented(self) -> float:
        """Bytes that are reserved for each that is allocated, at least 1."""
        return max(self.reserved_bytes / self.allocated_bytes, 1.0) if self.allocated_bytes else 1.0


def beside_bytes(num_ranks: int) -> int:
    """Bytes of a GPU that are neither a model's nor torch's; one rank has nobody to communicate with."""
    return CONTEXT_BYTES + (NCCL_BYTES if num_ranks > 1 else 0)


def footprint(
    plan: Plan, hints: Mapping[str, int], num_ranks: int, *, expandable: bool, library_bytes: int = 0
) -> Footprint:
    """Peaks of a training step with torch's AdamW: `NUM_STEPS` steps are played to an allocator, request by request.

    Parameters lie side by side in one block for each dtype, as at rest; moments are a block a parameter. The update
    takes one more as large as each master, all at once.

    Args:
        plan: of the step.
        hints: a number for each symbolic size.
        num_ranks: of the job.
        expandable: whether the allocator has expandable segments.
        library_bytes: of the matmul library's workspace, which lies in the allocator.
    """
    found = CachingAllocator(expandable=expandable)
    flat, masters, others = _resting(plan.graph)
    for num_bytes in (*flat.values(), *others, library_bytes):
        if num_bytes:
            found.allocate(num_bytes)
    wanted, left = requests(plan, hints)
    for step in range(NUM_STEPS):
        alive: dict[str, Block] = {}
        for name, num_bytes in wanted:
            if num_bytes:
                alive[name] = found.allocate(num_bytes)
            else:
                found.free(alive.pop(name))
        if plan.backward is not None:
            for num_bytes in (*masters, *masters) if step == 0 else ():
                found.allocate(num_bytes)
            for block in [found.allocate(num_bytes) for num_bytes in masters]:
                found.free(block)
        for name in left:
            found.free(alive.pop(name))
    return Footprint(found.peak_allocated, found.peak_reserved, beside_bytes(num_ranks))


def _resting(graph: Graph) -> tuple[dict[str, int], list[int], list[int]]:
    """Bytes of a rank's parameters by dtype, of each master whose update is on the device, and of each buffer."""
    flat, masters, others = dict[str, int](), list[int](), list[int]()
    for entry in graph.inputs:
        num_bytes = local_bytes(entry.value.type, graph.mesh, {})
        if entry.kind in (InputKind.buffer, InputKind.constant):
            others.append(num_bytes)
        elif entry.kind is InputKind.param:
            kind = entry.value.tensor
            if not kind.is_on_host:
                flat[kind.dtype.value] = flat.get(kind.dtype.value, 0) + num_bytes
            if not entry.offload:
                masters.append(num_bytes * (entry.master or kind.dtype).itemsize // kind.dtype.itemsize)
    return flat, masters, others
