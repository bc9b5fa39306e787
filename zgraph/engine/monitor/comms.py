"""Times each collective of a step alone: the bandwidth that the network gives it with no computation beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from zgraph.compiler.report import mebibytes
from zgraph.ir import OPS, Node, Plan
from zgraph.ir.ops import moved_bytes
from zgraph.runtime import Session
from zgraph.runtime.clock import Clock
from zgraph.runtime.collectives import exchange

NUM_IN_A_ROW = 10


class CollectiveTimes:
    """Seconds of the collectives of a plan, each different one (a kind and its bytes) measured once.

    Args:
        session: whose ranks take part.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seconds: dict[tuple[str, int], float] = {}

    def measure(self, plan: Plan) -> None:
        """Measure what was not measured yet. All ranks must come here, in the same step."""
        for node in plan.collectives:
            if (key := _key(node, plan)) not in self.seconds:
                self.seconds[key] = self._alone(*key)

    def _alone(self, kind: str, num_bytes: int) -> float:
        """The second of two in a row, as the first one opens connections; on GPUs the mean of ten, by events."""
        clock = Clock(self.session.device, is_cold=False)
        count = NUM_IN_A_ROW if clock.on_device else 1
        run = exchange(kind, self.session, max(num_bytes // 4, self.session.num_ranks), count)
        run()
        self.session.synchronize()
        (seconds,) = clock.seconds(run, 1)
        return seconds / count

    def table(self, plan: Plan) -> Table:
        """The collectives of a step by kind and phase.

        The bus bandwidth is that of nccl-tests: the bytes of the whole tensor over the time, times (n - 1) / n for
        gathers and reduce-scatters, 2 (n - 1) / n for all-reduces, and 1 for broadcasts, so that it can be compared
        with the rate of the links whatever the collective and the number of ranks n.
        """
        table = Table(title="collectives of a forward and backward, each measured alone", title_justify="left")
        table.add_column("collective")
        table.add_column("phase")
        for name in ("calls", "sent per rank", "time", "bus bandwidth"):
            table.add_column(name, justify="right")
        groups: dict[tuple[str, str], list[Node]] = {}
        for node in plan.collectives:
            groups.setdefault((node.op, node.phase.name), []).append(node)
        for (op, phase), nodes in groups.items():
            sent = sum(OPS[op].wire_bytes(n, plan.graph.mesh) for n in nodes)
            seconds = sum(self.seconds[_key(n, plan)] for n in nodes)
            rate = bus_bytes(nodes, plan) / seconds / 1e9
            table.add_row(
                op.removesuffix("_start"),
                phase,
                str(len(nodes)),
                mebibytes(sent),
                f"{1e3 * seconds:,.2f} ms",
                f"{rate:.3f} GB/s",
            )
        return table


def bus_bytes(nodes: Sequence[Node], plan: Plan) -> int:
    """Bytes that nccl-tests counts for the bus: what a rank sends, but all of a broadcast."""
    mesh = plan.graph.mesh
    return sum(moved_bytes(n, mesh) if n.op == "broadcast_start" else OPS[n.op].wire_bytes(n, mesh) for n in nodes)


def _key(node: Node, plan: Plan) -> tuple[str, int]:
    return node.op.removesuffix("_start"), moved_bytes(node, plan.graph.mesh)
