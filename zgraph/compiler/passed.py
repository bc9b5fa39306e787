"""The passes on one captured graph: with whoever watches them, what was checked, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zgraph.certify.certificate import Certifier
from zgraph.certify.record import Certificate
from zgraph.compiler.codec_choice import CodecChoice
from zgraph.compiler.float8_layers import Float8Layers
from zgraph.compiler.narrator import Narrator
from zgraph.compiler.plans import Giving
from zgraph.cost import Timeline, simulate
from zgraph.environment import environment
from zgraph.errors import VerifyError
from zgraph.ir import Graph, Plan
from zgraph.passes import Context, Pipeline, make_plan
from zgraph.passes.core.instruments import Dump, Log, PassSummary, Verify
from zgraph.runfile.format import Provenance, Recording, RunFile, last_graph
from zgraph.runfile.kept import Kept, Said, kept
from zgraph.runfile.sources import sources_of


@dataclass(frozen=True)
class Passed:
    """Result of the passes on one graph.

    Args:
        final: the graph after all of them.
        plan: of that.
        steps: summaries of the passes.
        timeline: the predicted step; None where it is not simulated yet.
        certificate: of what was checked; None where ZGRAPH_VERIFY=0 left the checks out.
        said: what reports say of choices.
        source: where a plan that was reused comes from, in words; empty where the passes ran.
    """

    final: Graph
    plan: Plan
    steps: tuple[PassSummary, ...]
    timeline: Timeline | None
    certificate: Certificate | None
    said: Said
    source: str = ""


@dataclass(frozen=True)
class PassRun:
    """A run of the passes that is to be.

    Args:
        pipeline: the passes.
        graph: as captured.
        context: what they know.
        replayed: a run whose last graph takes their place; None for none.
        model: the name of the model's class.
        rank: of this process.
        paths: where to write a run file.
    """

    pipeline: Pipeline
    graph: Graph
    context: Context
    replayed: RunFile | None
    model: str
    rank: int
    paths: Sequence[Path]

    def __call__(self, narrator: Narrator, giving: Giving | None) -> Passed:
        """Run them; keep the result, and give it to those that wait for it.

        Args:
            narrator: tells of each pass.
            giving: for whom the result is; None for this run on this rank alone.

        Raises:
            BudgetError: no way was found to fit the memory budget.
            VerifyError: the result does not compute what was captured.
        """
        settings = environment()
        log, float8, choice = Log(), Float8Layers(), CodecChoice(self.context)
        certifier = Certifier(self.graph, self.context, thorough=settings.verify == 2 or self.replayed is not None)
        recording = Recording(self.graph, sources=sources_of(self.graph) if self.paths else {})
        instruments: list[Any] = [log, narrator, float8, choice, certifier]
        if settings.verify == 2:
            instruments.append(Verify())
        if settings.dump:
            instruments.append(Dump(settings.dump / f"rank{self.rank}"))
        if self.paths:
            instruments.append(recording)
        final = self._final(instruments, certifier)
        said = Said(codecs=choice.said, float8=tuple(sorted(float8.chosen)), left_out=float8.left_out)
        plan = make_plan(final)
        timeline: Timeline | None = None
        made: Kept | None = None
        if giving is not None and giving.is_wanted:
            timeline = simulate(plan, self.context.costs, self.context.hints)
            made = kept(giving.key, certifier, log.steps, timeline, said)
            giving.give(made)
        with _named_remedy():
            certificate = certifier.finish() if settings.verify else None
        for path in self.paths:
            recording.run_file(made_by(self.model), self.context, certificate).save(path)
        if giving is not None and made is not None:
            giving.keep(made)
        return Passed(final, plan, tuple(log.steps), timeline, certificate, said)

    def _final(self, instruments: Sequence[Any], certifier: Certifier) -> Graph:
        if self.replayed is None:
            with _named_remedy():
                return self.pipeline.run(self.graph, self.context, instruments)
        final = last_graph(self.replayed, self.graph, self.context)
        for name in self.replayed.names[1:]:
            certifier.add(name.partition("#")[0], self.replayed.graph(name))
        return final


@contextmanager
def _named_remedy() -> Iterator[None]:
    """Say what to do about a graph that is refused."""
    try:
        yield
    except VerifyError as error:
        raise VerifyError(
            f'{error}\n\nNothing was run with it. The name behind "after" is the pass to look at: leave it out '
            '(ZGRAPH_DISABLE), or find the rewrite (save="run.zg", then zgraph bisect run.zg). ZGRAPH_VERIFY=0 runs '
            "the graph as it is, which may train on wrong numbers."
        ) from None


def made_by(model: str) -> Provenance:
    """Provenance of a run file that is made here of a model, by the name of its class."""
    return Provenance(model=model, torch=torch.__version__)
