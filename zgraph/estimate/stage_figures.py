"""Figures of a plan for one ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.cost import Interval

TIED = 1.01
"""Of stages whose times differ by less than this factor, the lowest is taken."""


@dataclass(frozen=True)
class StagePlan:
    """Memory, time and traffic of one stage on each rank.

    Args:
        stage: the ZeRO stage.
        whole: names of parameters that are at stage 0 all the same.
        offload: what is at rest on the host: nothing, "optimizer" or "parameters".
        moved_share: the part of what waits for the backward that does so on the host.
        rest_bytes: bytes at rest on the device by category: parameters, optimizer state, buffers.
        peak_bytes: bytes on the device by category at the peak of the step, those at rest included.
        host_bytes: bytes on the host at the peak of the step.
        needed_bytes: the peak if all that can be is moved or computed again, layer by layer: what the stage cannot do
            without.
        step_us: the predicted time of a forward and backward.
        update_us: the predicted time of AdamW's update.
        exposed_us: the part of the step in which computing waits for communication or copies.
        sent_bytes: bytes that a rank sends in a step.
        flop: of one rank's matmuls in a step, what is computed again not counted.
        again_share: FLOP of what is computed again, over those of the step without.
        fits: whether the peak is within the budget, and the host has room.
        time: microseconds of a step with its update, and between which bounds four of five measurements lie.
        memory: the same of the peak of what is allocated, in bytes.
        reserved: the same of what a GPU's allocator reserves; None on processors.
        beside_bytes: of a GPU's memory what is not torch's: the driver's context, and NCCL's buffers.
    """

    stage: int
    whole: frozenset[str]
    offload: str
    moved_share: float
    rest_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    host_bytes: int
    needed_bytes: int
    step_us: float
    update_us: float
    exposed_us: float
    sent_bytes: int
    flop: float
    again_share: float
    fits: bool
    time: Interval
    memory: Interval
    reserved: Interval | None = None
    beside_bytes: int = 0

    @property
    def title(self) -> str:
        """The stage, and that of parameters that are whole."""
        return f"{self.stage} and 0" if self.whole else str(self.stage)

    @property
    def total_bytes(self) -> int:
        """All bytes on the device at the peak."""
        return sum(self.peak_bytes.values())

    @property
    def total_us(self) -> float:
        """The predicted time of a step with its update."""
        return self.step_us + self.update_us

    def stage_of(self, name: str) -> int:
        """The stage of a parameter: this is what `zgraph.compile(model, stage=...)` takes."""
        return 0 if name in self.whole else self.stage
