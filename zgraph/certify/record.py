"""Certificates: which rules hold of which graphs. Written into run files."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field


class Checked(BaseModel):
    """One rule on one graph: the nodes that it was checked on, and seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str = Field(max_length=200)
    rule: str = Field(max_length=200)
    num_nodes: int = Field(ge=0)
    seconds: float = Field(ge=0)


class Footprint(BaseModel):
    """Memory of a run on one rank's device: bytes at rest, bytes at the peak above them and the node where it is, and
    bytes of the optimizer's step. The budget is None where there is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str = Field(max_length=200)
    phase: str = Field(max_length=10)
    peak_bytes: int = Field(ge=0)
    rest_bytes: int = Field(ge=0)
    update_bytes: int = Field(default=0, ge=0)
    budget: int | None = None

    @property
    def total_bytes(self) -> int:
        """All bytes on the device at the highest moment of the step and its update."""
        return self.rest_bytes + max(self.peak_bytes, self.update_bytes)

    def __str__(self) -> str:
        where = f"%{self.node}, {self.phase}" if self.node else "no node"
        budget = "no budget" if self.budget is None else f"budget {self.budget:,}"
        parts = f"{self.peak_bytes:,} at the peak ({where}), {self.rest_bytes:,} at rest"
        return f"{self.total_bytes:,} bytes of the device at most: {parts}; {budget}"


class Certificate(BaseModel):
    """Record of what was checked of a run. The one in a file is a claim; `zgraph verify` makes it anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checked: tuple[Checked, ...] = Field(default=(), max_length=10_000)
    footprint: Footprint | None = None

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.checked)

    @property
    def lines(self) -> Iterator[str]:
        """A line for each rule: on how many graphs and nodes it holds."""
        for rule in dict.fromkeys(c.rule for c in self.checked):
            some = [c for c in self.checked if c.rule == rule]
            nodes, seconds = sum(c.num_nodes for c in some), sum(c.seconds for c in some)
            graphs = f"{len(some)} graph{'s' * (len(some) > 1)}"
            yield f"{rule}: {graphs}, {nodes:,} nodes, {1e3 * seconds:,.0f} ms"
        if self.footprint is not None:
            yield str(self.footprint)

    def __str__(self) -> str:
        return f"certified in {1e3 * self.seconds:,.0f} ms: {'; '.join(self.lines)}"
