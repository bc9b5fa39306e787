"""Instruments that watch a pipeline run: timing and counts, dumps, verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zgraph.errors import VerifyError, ZirError
from zgraph.ir import Graph, parse_graph, print_graph, verify
from zgraph.passes.core.base import Pass
from zgraph.passes.core.pipeline import print_pass


@dataclass(frozen=True, slots=True)
class PassSummary:
    """Summary of one pass: how many ops of each kind it added (or removed, below zero), and how long it took."""

    text: str
    seconds: float
    num_nodes: int
    changed: Mapping[str, int]

    @classmethod
    def of(cls, text: str, before: Graph, after: Graph, seconds: float) -> PassSummary:
        """The summary of a pass, from the graphs before and after it."""
        counts = Counter(n.op for n in after.nodes)
        counts.subtract(n.op for n in before.nodes)
        return cls(text, seconds, len(after.nodes), {op: count for op, count in counts.items() if count})

    @property
    def summary(self) -> str:
        """The changes as text, `+2 wait -1 reshard`, the largest first."""
        order = sorted(self.changed.items(), key=lambda item: (-abs(item[1]), item[0]))
        return " ".join(f"{count:+d} {op}" for op, count in order) or "order only or nothing"


@dataclass
class Log:
    """Keeps a PassSummary for every pass: the timing and op-count difference of the report."""

    steps: list[PassSummary] = field(default_factory=list)

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        self.steps.append(PassSummary.of(print_pass(step), before, after, seconds))


@dataclass(frozen=True)
class Verify:
    """Verifies the graph after every pass, and that its text reads back to it; names the pass that broke it."""

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        try:
            verify(after)
            if parse_graph(print_graph(after)) != after:
                raise VerifyError("[text] the graph's text does not read back to the graph")
        except (VerifyError, ZirError) as error:
            raise VerifyError(f"after the pass {step.name}: {error}") from None


@dataclass
class Dump:
    """Writes the graph after every pass to `folder`, one numbered `.zir` file each."""

    folder: Path
    count: int = 0

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.count == 0:
            self.write("captured", before)
        self.count += 1
        self.write(step.name, after)

    def write(self, name: str, graph: Graph) -> None:
        (self.folder / f"{graph.name}-{self.count:02d}-{name}.zir").write_text(print_graph(graph))
