"""Memory that a GPU's allocator reserves for a model that was captured in few layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zgraph.cost.reserved import Footprint, footprint
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.ir import Plan


def scaled_footprint(
    samples: LayerSamples,
    plans: Sequence[Plan],
    hints: Mapping[str, int],
    allocated_bytes: int,
    num_ranks: int,
    *,
    expandable: bool,
    library_bytes: int,
) -> Footprint:
    """Footprint of the whole model, from those of its samples.

    What is reserved beyond what is allocated grows with the layers, in steps as large as a segment. It is taken to grow
    as from one sample to the next; by no more than what is allocated does, and never to fall below what a sample has.

    Args:
        samples: the model.
        plans: of each member.
        hints: a number for each symbolic size.
        allocated_bytes: the peak of the whole model.
        num_ranks: of the job.
        expandable, library_bytes: as for `footprint`.
    """
    found = [footprint(plan, hints, num_ranks, expandable=expandable, library_bytes=library_bytes) for plan in plans]
    beyond = [one.reserved_bytes - one.allocated_bytes for one in found]
    least, most = max(beyond), int(allocated_bytes * (max(one.fragmented for one in found) - 1))
    grown = int(samples.scale(beyond))
    return Footprint(allocated_bytes, allocated_bytes + max(min(grown, most), least), found[0].beside_bytes)
