"""Which linear layers of a model are multiplied in float8, and why the others are not, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from zgraph.ir import Graph
from zgraph.passes import Pass
from zgraph.passes.float8 import Float8

MOST_NAMES = 6
"""Layers that are named for one reason."""


@dataclass
class Float8Layers:
    """An instrument of pipelines, which notes what the pass does to each graph.

    Args:
        chosen: names of the layers that are in float8.
        left_out: why each of the others is not, by name.
    """

    chosen: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Take note of a pass that has run."""
        if isinstance(step, Float8):
            self.chosen.update(step.layers(before))
            self.left_out |= step.left_out(before)

    def add(self, chosen: Iterable[str], left_out: Mapping[str, str]) -> None:
        """Take note of what was chosen for another graph."""
        self.chosen.update(chosen)
        self.left_out |= left_out

    def __str__(self) -> str:
        """Text for people; empty if no pass chose."""
        if not self.chosen and not self.left_out:
            return ""
        said = [f"{len(self.chosen)} of {len(self.chosen | self.left_out.keys())} linear layers"]
        for why in dict.fromkeys(self.left_out.values()):
            names = [name for name, reason in self.left_out.items() if reason == why]
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            said.append(f"not {', '.join(names[:MOST_NAMES])}{more}: {why}")
        return "; ".join(said)
