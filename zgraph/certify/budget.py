"""Whether a graph keeps within the memory budget that it was compiled for, by the peak that is recomputed from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zgraph.certify.memory import Peak, local_bytes
from zgraph.certify.record import Footprint
from zgraph.ir import Graph, InputKind
from zgraph.ir.arena import buffers
from zgraph.ir.verifier import Fault
from zgraph.passes.core.base import Context


@dataclass(frozen=True)
class Limit:
    """Memory limit of a run.

    Args:
        budget: bytes that one rank's device may have alive; None for no limit.
        rest_bytes: bytes of them at rest, with the optimizer's state, as the run says.
        update_bytes: bytes that the optimizer's step has alive above them, as the run says.
        stated: the peak above rest that the run's own prediction has; None where it has none.
    """

    budget: int | None = None
    rest_bytes: int = 0
    update_bytes: int = 0
    stated: int | None = None

    @classmethod
    def of(cls, context: Context, stated: int | None = None) -> Limit:
        """The limit of a run that was compiled in this context."""
        return cls(context.memory_budget, context.rest_bytes, context.update_bytes, stated)


def is_lowered(graph: Graph) -> bool:
    """Whether a graph is one that runs: no reshard is left for a pass to carry out."""
    return all(node.op != "reshard" for node in graph.nodes)


def footprint(graph: Graph, peak: Peak, limit: Limit, hints: Mapping[str, int]) -> Footprint:
    """Device memory of a graph with this peak. Bytes at rest are the run's own figure, but at least the graph's."""
    rest = max(limit.rest_bytes, rest_bytes(graph, hints))
    return Footprint(
        node=peak.node[:200],
        phase=peak.phase,
        peak_bytes=peak.num_bytes,
        rest_bytes=rest,
        update_bytes=max(limit.update_bytes, 0),
        budget=limit.budget,
    )


def rest_bytes(graph: Graph, hints: Mapping[str, int]) -> int:
    """Bytes of this rank's parts of parameters, buffers and constants on the device; no optimizer's state."""
    kinds = (InputKind.param, InputKind.buffer, InputKind.constant)
    return sum(local_bytes(i.value.type, graph, hints) for i in graph.inputs if i.kind in kinds)


def over(graph: Graph, peak: Peak, found: Footprint, limit: Limit) -> Iterator[Fault]:
    """How a graph breaks its limit."""
    position = next((p for p, n in enumerate(graph.nodes) if (n.name, n.phase.value) == (peak.node, peak.phase)), None)
    largest = ", ".join(f"%{name} {size:,}" for name, size in peak.largest)
    if found.budget is not None and found.total_bytes > found.budget:
        above = f"above {found.rest_bytes:,} at rest, and the budget is {found.budget:,} bytes"
        remedy = "let fit and schedule make the graph, or give it more"
        if peak.num_bytes >= found.update_bytes:
            yield position, f"is the peak of the step: {peak.num_bytes:,} {above}; the largest are {largest}; {remedy}"
        else:
            yield None, f"the optimizer's step takes {found.update_bytes:,} bytes {above}; {remedy}"
    if limit.stated is not None and peak.num_bytes > limit.stated:
        yield position, f"has {peak.num_bytes:,} bytes alive, but the run states a peak of {limit.stated:,}: {largest}"
    for program, size in graph.arenas.items():
        lying = sum(b.num_bytes for b in buffers(graph, program) if b.offset is not None)
        if size > lying:
            yield None, f"the arena {program.value} has {size:,} bytes, but all that lies in it takes {lying:,}"
