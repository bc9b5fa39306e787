"""Run files of what a compiled model has captured: all of it again, or what is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from zgraph.compiler.report import Entry
from zgraph.ir import Graph, Plan
from zgraph.passes import Context, Pipeline
from zgraph.runfile.format import CAPTURED, Provenance, Recording, RunFile, run_file
from zgraph.runfile.sources import sources_of


@dataclass(frozen=True)
class Again:
    """Runs the passes on a captured graph again. The result is the same whenever and wherever they run."""

    captured: Graph
    context: Context
    pipeline: Pipeline
    model: str
    replayed: RunFile | None

    def __call__(self) -> RunFile:
        if self.replayed is not None:
            return self.replayed
        recording = Recording(self.captured, sources=sources_of(self.captured))
        self.pipeline.run(self.captured, self.context, [recording])
        return recording.run_file(made_by(self.model), self.context)


def kept_run(graph: Graph, plan: Plan, entry: Entry, context: Context, model: str) -> RunFile:
    """A run of the first and the last graph, with its prediction and its certificate."""
    last = entry.steps[-1].text if entry.steps else CAPTURED
    run = run_file([(CAPTURED, graph, 0.0), (last, plan.graph, 0.0)], made_by(model), context)
    return replace(run.with_timeline(entry.timeline), certificate=entry.certificate)


def made_by(model: str) -> Provenance:
    return Provenance(model=model, torch=torch.__version__)
