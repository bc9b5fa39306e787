"""A timeline as JSON, and back. A row is one span, stall or moment; its columns are the fields, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from zgraph.cost.memory import MemoryCurve, Moment
from zgraph.cost.simulator import Span, Stall, Timeline
from zgraph.ir.op_rows import Lane

Us = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
PhaseName = Literal["fwd", "bwd", "upd"]


class TimelineRecord(BaseModel):
    """Record of a timeline, as a file holds it.

    Args:
        step_us, busy_us: as in `Timeline`.
        spans: lane, node, op, phase, begin and end in microseconds.
        stalls: node, start, phase, begin and length in microseconds.
        moments: node, phase, bytes by category, bytes on the host, and when it begins, in microseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step_us: Us
    busy_us: Mapping[Lane, Us]
    spans: tuple[tuple[Lane, str, str, PhaseName, Us, Us], ...]
    stalls: tuple[tuple[str, str, PhaseName, Us, Us], ...]
    moments: tuple[tuple[str, PhaseName, Mapping[str, Bytes], Bytes, Us], ...]

    @classmethod
    def of(cls, timeline: Timeline) -> TimelineRecord:
        """The record of a timeline."""
        return cls.model_validate(
            {
                "step_us": timeline.step_us,
                "busy_us": timeline.busy_us,
                "spans": [(s.lane, s.node, s.op, s.phase, s.start_us, s.end_us) for s in timeline.spans],
                "stalls": [(s.node, s.start, s.phase, s.start_us, s.us) for s in timeline.stalls],
                "moments": [
                    (m.node, m.phase, m.bytes_by_category, m.host_bytes, us)
                    for m, us in zip(timeline.memory.moments, timeline.instants_us, strict=True)
                ],
            }
        )

    def timeline(self) -> Timeline:
        """The timeline of a record."""
        memory = MemoryCurve(tuple(Moment(node, phase, sizes, host) for node, phase, sizes, host, _ in self.moments))
        instants = tuple(us for *_, us in self.moments)
        spans, stalls = (Span(*row) for row in self.spans), (Stall(*row) for row in self.stalls)
        return Timeline(tuple(spans), tuple(stalls), self.step_us, memory, instants, dict(self.busy_us.items()))
