"""Codecs that `compress` chose by itself, and why, for the report."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.ir import Graph
from zgraph.passes import Context, Pass
from zgraph.passes.compress import LEAST_SAVED, Compress
from zgraph.runfile.format import has_backward


@dataclass
class CodecChoice:
    """An instrument of a pipeline, which notes what `compress(gradients=auto)` chose for a training graph.

    Args:
        context: facts that the passes know.
        said: the choice for people; empty if there was none to make.
    """

    context: Context
    said: str = ""

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Take note of a pass that has run."""
        if not isinstance(step, Compress) or step.gradients != "auto" or not has_backward(before):
            return
        times = step.times_us(before, self.context)
        chosen = next((n.option("codec") for n in after.nodes if n.op == "encode"), None)
        listed = ", ".join(f"{text or 'numbers'} {us / 1e3:,.1f} ms" for text, us in times.items())
        why = "" if chosen else f": no codec saves {LEAST_SAVED:.0%} of the step"
        self.said = f"{chosen or 'none'}{why} (predicted step: {listed})"
