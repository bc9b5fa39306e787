"""The parts of a lease, in their order: what breaks users first comes first."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.errors import UnknownName

LIMIT_S = 540.0
"""Seconds of a whole lease."""


@dataclass(frozen=True)
class Part:
    """A part of a lease. The module `benchmarks.lease.NAME` has it as `run(emit, small)`.

    Args:
        name: its module.
        proves: what passes if it passes.
        limit_s: seconds after which its processes are killed.
        least_s: seconds without which it is not worth starting.
        num_ranks: processes that it runs in.
    """

    name: str
    proves: str
    limit_s: float
    least_s: float
    num_ranks: int = 1


PARTS = (
    Part("machine", "what the machine can do, and that `zgraph.profile_machine` says the same", 45, 10),
    Part("kernels", "that every generated kernel computes its steps", 100, 20),
    Part("parity", "that one rank trains as eager torch does, within the predicted memory", 90, 20),
    Part("sharded", "that streams are ordered: two ranks train the same, whatever stream is late", 110, 30, 2),
    Part("steps", "how whole steps compare with torch.compile, and what the device waits for", 150, 40),
    Part("nccl", "that NCCL has the calls that the runtime makes, and that groups can be aborted", 40, 15),
    Part("groups", "how fused groups compare with torch.compile", LIMIT_S, 20),
)


def named(name: str) -> Part:
    """The part of a name.

    Raises:
        UnknownName: there is none.
    """
    for part in PARTS:
        if part.name == name:
            return part
    raise UnknownName(f"no part is called {name!r}", f"Use one of: {', '.join(part.name for part in PARTS)}")
