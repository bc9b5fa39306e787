"""A compiled model: each captured graph through the passes, to what runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from zgraph.bridge.scratch import known_scratch, measured_scratch
from zgraph.capture import Compiled
from zgraph.compiler.autotune import tuned
from zgraph.compiler.call_guard import eager
from zgraph.compiler.float8_layers import Float8Layers
from zgraph.compiler.narrator import Narrator
from zgraph.compiler.passed import Passed, PassRun, made_by
from zgraph.compiler.plan_key import foreign, key_of, lines_of
from zgraph.compiler.plans import Found, Plans
from zgraph.compiler.recordings import Recordings, choose_calls
from zgraph.compiler.report import Entry, Report, make_entry
from zgraph.compiler.step_recorder import StepRecorder
from zgraph.compiler.trace_folder import KeptTraces
from zgraph.cost import memory_interval
from zgraph.cost.workspace import NUM_THREADS, is_measured
from zgraph.environment import environment
from zgraph.errors import UsageError, did_you_mean
from zgraph.ir import Graph, print_graph, verify
from zgraph.ir.rules.kept import gathered_for
from zgraph.options.validate import ATTRIBUTE, CudaGraphs, RegionCalls
from zgraph.passes import Context, Pipeline, known_passes, make_plan
from zgraph.passes.fuse import Fuse
from zgraph.runfile.format import Recording, RunFile, has_backward
from zgraph.runfile.sources import sources_of
from zgraph.runtime import Session
from zgraph.runtime.executor import Runner
from zgraph.runtime.linker import link_plan
from zgraph.runtime.regions import Regions
from zgraph.runtime.unused import tangents_behind


class Trial(Protocol):
    """Who watches the first runs of a program: see `zgraph.compiler.replanning`."""

    def watched(self, run: Runner, phase: str) -> Runner: ...

    def survives(self, error: BaseException) -> bool: ...


class CompiledModel:
    """Compiled state that `zgraph.compile` attaches to a model.

    Args:
        model: the model.
        session: what its programs work on.
        pipeline: the passes.
        context: of the passes.
        save: where the first rank writes what the passes made of the first graph; the others have numbers.
        replayed: a run whose last graph takes the place of the passes, for the training graph.
        regions: if given, they compile what is between collectives.
        tunes: whether the candidates for running a group are measured before a graph is compiled.
        narrator: tells the user of what is captured; None tells nothing.
        trial: watches the first runs of a program, given this and the peak that is planned; None watches nothing.
        kernels: what runs the ops between collectives, for the report.
        cuda_graphs: whether programs are recorded for the GPU to repeat.
        region_calls: how new regions are called; "auto" has libraries of C++ where launching takes longer than running.
        placements: what a search for placements found, in words, for the report.
        record: keeps what the steps of the first training graph take; None keeps nothing.
        plans: where plans come from beside the passes; None has every graph go through them.

    `smaller_budget` is the one to plan again with, once a first run was out of memory.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        pipeline: Pipeline,
        context: Context,
        save: Path | None = None,
        replayed: RunFile | None = None,
        regions: Regions | None = None,
        *,
        tunes: bool = False,
        narrator: Narrator | None = None,
        trial: Callable[[CompiledModel, int], Trial] | None = None,
        kernels: str = "aten",
        cuda_graphs: CudaGraphs = False,
        region_calls: RegionCalls = "python",
        placements: str = "",
        record: StepRecorder | None = None,
        plans: Plans | None = None,
    ) -> None:
        self.model, self.session, self.context = model, session, context
        self.save, self.replayed, self.regions, self.tunes = save, replayed, regions, tunes
        self.pipeline = enabled(pipeline)
        self.eager = eager(model.forward, session.store.param_dtype)
        self.narrator = narrator or Narrator(type(model).__name__, model.forward, (), "")
        self.trial, self.kernels, self.cuda_graphs, self.region_calls = trial, kernels, cuda_graphs, region_calls
        self.recordings: list[Recordings] = []
        self.placements, self.record, self.plans = placements, record, plans
        self.plain: Callable[[], nn.Module] | None = None
        self.traces = KeptTraces(None, self.trace_salt)
        self.smaller_budget: int | None = None
        self.is_replanned = False
        self.entries: list[Entry] = []
        self.hints: dict[str, int] = {}
        self.float8, self.codec_choice = Float8Layers(), ""
        self._planned: set[bool] = set()
        self._tuned: set[bool] = set()

    def compile_graph(self, graph: Graph, constants: Mapping[str, torch.Tensor], hints: Mapping[str, int]) -> Compiled:
        """A captured graph through the passes, planned, agreed on and linked."""
        settings = environment()
        self.narrator.captured(graph, len(self.pipeline.passes), is_general=bool(hints))
        if settings.verify:
            verify(graph)
        text, behind = print_graph(graph, origins=False), tangents_behind(graph)
        graph = replace(graph, name=f"{graph.name}-{len(self.entries)}")
        together = has_backward(graph) not in self._planned
        hints = self._agreed_hints(graph, hints)
        self.hints.update(hints)
        if self.tunes:
            self._tune(graph, hints)
        context = replace(self.context, hints=hints)
        is_recorded = self.record is not None and not self.record.is_taken and has_backward(graph)
        paths = list(self._run_paths(graph.name, settings.dump))
        if self.record is not None and is_recorded and self.session.store.rank == 0:
            paths.append(self.record.run_path)
        made = self._planned_by(graph, context, paths, together=together)
        final, plan = made.final, made.plan
        self.codec_choice = made.said.codecs or self.codec_choice
        self.float8.add(made.said.float8, made.said.left_out)
        if whole := gathered_for(final):
            ops = ", ".join(f"{op} ({count})" for op, count in whole.items())
            self.narrator.remark(f"values are put together in each step for ops without a sharding rule: {ops}")
        replayed = self.replayed if has_backward(graph) else None
        again = _Again(graph, context, self.pipeline, type(self.model).__name__, replayed)
        entry = make_entry(plan, made.steps, context, again, made.timeline, made.certificate)
        if waiting := entry.memory.host_peak_bytes:
            self.session.host.require(waiting, "the values that wait for the backward on the host")
        sizes = sorted(name for name in hints if not is_measured(name))
        known = f"planned for {', '.join(f'{name}={hints[name]}' for name in sizes)}"
        update_bytes = context.update_bytes if plan.backward is not None else 0
        peak_bytes = context.rest_bytes + max(entry.memory.peak.total_bytes, update_bytes)
        trial = self.trial(self, peak_bytes) if self.trial is not None else None
        if context.memory_budget is not None:
            self.session.arenas.room_bytes = context.memory_budget - context.rest_bytes - update_bytes
        kept = sum(found.kept_bytes for found in self.recordings)
        found = Recordings(plan, self.session, context, self.cuda_graphs, kept) if self.cuda_graphs else None
        if self.regions is not None and self.region_calls != "python":
            choose_calls(self.regions, plan, context, self.region_calls, self.session.device)
        forward, backward = link_plan(
            self.session,
            plan,
            constants,
            text,
            known,
            self.regions,
            behind,
            trial.survives if trial is not None else lambda error: False,
            found.maker if found is not None else None,
        )
        self.recordings += [found] if found is not None else []
        if trial is not None:
            forward = trial.watched(forward, "forward")
            backward = trial.watched(backward, "backward") if backward is not None else None
        if self.record is not None and is_recorded and backward is not None:
            forward, backward = self.record.watched(plan, forward, backward)
        self.entries.append(entry)
        peak = memory_interval(peak_bytes, context.costs)
        self.narrator.compiled(graph, entry.steps, entry.time, peak, made.source)
        return Compiled(plan, forward, backward)

    def _planned_by(self, graph: Graph, context: Context, paths: Sequence[Path], *, together: bool) -> Passed:
        """The plan that the passes make of a graph, or have made of it in another run or on another rank.

        Args:
            graph: as captured.
            context: what they know.
            paths: of run files to write, for which the passes must run.
            together: whether all ranks are here with their first graph of this kind.
        """
        run = PassRun(
            self.pipeline,
            graph,
            context,
            self.replayed if has_backward(graph) else None,
            type(self.model).__name__,
            self.session.store.rank,
            paths,
        )
        if self.plans is None:
            return run(self.narrator, None)
        found = self.plans.find(self._key(graph, context, paths), graph, context, together=together)
        if isinstance(found, Found):
            kept = found.plan
            plan = make_plan(kept.final)
            return Passed(kept.final, plan, kept.summaries, kept.timeline, found.certificate, kept.said, found.source)
        try:
            return run(self.narrator, found)
        finally:
            found.give(None)  # where there is one, it was given

    def _key(self, graph: Graph, context: Context, paths: Sequence[Path]) -> str:
        """The key of a plan; empty where the passes must run, and where what they make follows from more than that."""
        if paths or (self.replayed is not None and has_backward(graph)) or not self._may_keep:
            return ""
        assert self.plans is not None
        return key_of(self.plans.options, self.pipeline, context, graph)

    @property
    def _may_keep(self) -> bool:
        """Whether plans are kept: not where all is to be checked, nor with passes whose code no key knows."""
        settings = environment()
        wanted = settings.verify == 1 and settings.plans is not False and self.plans is not None
        return wanted and bool(self.pipeline.passes) and not foreign(self.pipeline)

    def trace_salt(self) -> str | None:
        """Text of what a kept trace depends on beside its graph; None where none is kept."""
        asked = self.save or self.record or self.replayed or environment().dump
        if asked or not self._may_keep or self.plans is None:
            return None
        return "\n".join(lines_of(self.plans.options, self.pipeline, self.context))

    def plan_smaller(self) -> None:
        """Plan with the smaller budget from now on. What was planned before is forgotten."""
        assert self.smaller_budget is not None, "only after a first run was out of memory"
        budget, self.smaller_budget, self.is_replanned = self.smaller_budget, None, True
        self.context = replace(self.context, memory_budget=budget)
        self.entries.clear()
        self.recordings.clear()
        self._planned.clear()
        self.session.plans.clear()
        self.session.forget_copies()
        if self.record is not None:
            self.record.restart()
        self.narrator.replanned(budget)

    def _agreed_hints(self, graph: Graph, hints: Mapping[str, int]) -> Mapping[str, int]:
        """Sizes and thread count to plan for, and on processors what ops take beside their operands.

        All ranks come here with their first graph of each kind, and plan with the first rank's sizes, threads and
        measurements. The last two hold later too: what a rank meets alone is not measured.
        """
        kind, has_threads = has_backward(graph), self.session.device.type == "cpu"
        if has_threads:
            hints = {**hints, NUM_THREADS: self.hints.get(NUM_THREADS, torch.get_num_threads())}
            measures = self.session.is_alone or (kind not in self._planned and self.session.store.rank == 0)
            hints = {**hints, **(measured_scratch(graph, hints) if measures else known_scratch(self.hints))}
        is_alone = self.session.is_alone or kind in self._planned
        self._planned.add(kind)
        if is_alone:
            return hints
        found = self.session.peers.exchange_values(f"sizes/{kind}", dict(hints))[0]
        if found.get(NUM_THREADS) != hints.get(NUM_THREADS):
            warnings.warn(
                f"this rank has {hints[NUM_THREADS]} threads; all ranks plan with the first rank's "
                f"{found[NUM_THREADS]}. Set OMP_NUM_THREADS to the same number on all ranks.",
                stacklevel=2,
            )
        own = {name: size for name, size in hints.items() if not is_measured(name)}
        return {name: int(found.get(name, size)) for name, size in own.items()} | known_scratch(found)

    def _run_paths(self, graph: str, dump: Path | None) -> Iterator[Path]:
        """Where to write what becomes of a graph."""
        if self.save is not None and self.session.store.rank == 0:
            number = len(self.entries)
            yield self.save.with_stem(f"{self.save.stem}-{number}") if number else self.save
        if dump is not None:
            yield dump / f"rank{self.session.store.rank}" / f"{graph}.zg"

    def _tune(self, graph: Graph, hints: Mapping[str, int]) -> None:
        """Measure the candidates for running what can be fused: for each training graph, and the first of inference.

        All ranks come here together with their first graph of each kind, and share the work. A rank that meets other
        sizes alone later measures nothing, as the others would choose otherwise: there the times of the nearest sizes
        decide.
        """
        kind = has_backward(graph)
        if kind in self._tuned and not (kind and self.session.is_alone):
            return
        self._tuned.add(kind)
        before = takewhile(lambda step: step.name != Fuse.name, self.pipeline.passes)
        fuse = next((step for step in self.pipeline.passes if isinstance(step, Fuse)), None)
        context = replace(self.context, hints=hints)
        seen = Pipeline(tuple(before)).run(graph, context)
        peers = None if self.session.is_alone else self.session.peers
        costs = tuned(seen, context, self.session.device, peers, self.narrator.remark, str(kind), fuse)
        self.context = replace(self.context, costs=costs)

    @property
    def _reused(self) -> str:
        """Words on what was reused."""
        traces, plans = self.traces.counts["reused"], str(self.plans or "")
        return "; ".join(filter(None, (plans, f"{traces} traced in an earlier run" if traces else "")))

    @property
    def report(self) -> Report:
        store = self.session.store
        buffers = buffer_bytes(self.model)
        whole = sum(s.parameter.nbytes for s in store.slots.values())
        return Report(
            type(self.model).__name__,
            str(self.pipeline),
            store.num_ranks,
            whole,
            store.rest_bytes,
            store.state_bytes,
            buffers,
            store.update_bytes,
            store.host_bytes,
            tuple(self.entries),
            self.regions,
            self.kernels,
            str(self.float8),
            self.codec_choice,
            self.session.feedback.num_bytes,
            str(self.session.feedback),
            self.session.copies.num_bytes,
            str(self.session.copies),
            tuple(str(found) for found in self.recordings),
            sum(found.kept_bytes for found in self.recordings),
            self.session.arenas.state,
            self.session.arenas.kept_bytes,
            self.placements,
            self._reused,
        )


@dataclass(frozen=True)
class _Again:
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


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of a model's buffers, which every rank holds."""
    return sum(b.nbytes for b in model.buffers())


def enabled(pipeline: Pipeline) -> Pipeline:
    """The passes that ZGRAPH_DISABLE leaves. Raises UsageError if it names what is none."""
    disabled = environment().disable
    known = known_passes()
    for name in disabled - known.keys():
        hint = did_you_mean(name, known, f"the passes are {', '.join(known)}")
        raise UsageError(f"ZGRAPH_DISABLE names {name}, which is no pass; {hint}")
    kept = Pipeline(tuple(p for p in pipeline.passes if p.name not in disabled))
    kept.check()
    return kept


def compiled_model(model: nn.Module) -> CompiledModel:
    """Compiled state that `zgraph.compile` attached to a model. Raises UsageError if it is not compiled."""
    found = model.__dict__.get(ATTRIBUTE) if isinstance(model, nn.Module) else None
    if not isinstance(found, CompiledModel):
        raise UsageError(f"this {type(model).__name__} is not compiled; call zgraph.compile(model) first")
    return found


def is_gathered(model: nn.Module) -> bool:
    """Whether a compiled model is within `zgraph.gathered`."""
    return model.__dict__["forward"] is compiled_model(model).eager
