"""Codecs that `compress` and `code-gathers` chose by themselves, and why, for the report."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.ir import Graph
from zgraph.passes import Context, Pass
from zgraph.passes.code_gathers import LEAST_SAVED as LEAST_EXACT
from zgraph.passes.code_gathers import CodeGathers
from zgraph.passes.compress import LEAST_SAVED, Compress
from zgraph.runfile.format import has_backward


@dataclass
class CodecChoice:
    """An instrument of a pipeline, which notes what `compress(gradients=auto)` and `code-gathers(codec=auto)` chose for
    a training graph.

    Args:
        context: facts that the passes know.
        said: the choices for people; empty if there was none to make.
    """

    context: Context
    said: str = ""

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Take note of a pass that has run."""
        if not has_backward(before):
            return
        if isinstance(step, Compress) and step.gradients == "auto":
            self._note("gradients", step, before, LEAST_SAVED)
        if isinstance(step, CodeGathers) and step.codec == "auto":
            self._note("parameters", step, before, LEAST_EXACT)

    def _note(self, what: str, step: Compress | CodeGathers, before: Graph, least: float) -> None:
        times = step.times_us(before, self.context)
        chosen = step.chosen(times)
        listed = ", ".join(f"{text or 'numbers'} {us / 1e3:,.1f} ms" for text, us in times.items())
        why = "" if chosen else f": no codec saves {least:.0%} of the step"
        names = chosen if isinstance(chosen, str) else " and ".join(chosen)
        found = f"of {what} {names or 'none'}{why} (predicted step: {listed})"
        self.said = f"{self.said}; {found}" if self.said else found
