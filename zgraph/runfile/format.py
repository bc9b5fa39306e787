"""`run.zg`: the captured graph, the graph after every pass, and what the passes knew, in one file.

A zip archive of texts that any tool opens; nothing in it is ever run as code:

    run.json                    format, provenance, recipe, context (mesh, costs, budget, ...), and the list of graphs
    graphs/00-captured.zir      the graph as captured
    graphs/01-canonicalize.zir  after the first pass, and so on
    certificate.json            what was checked of the graphs (`zgraph.certify`), which `zgraph verify` makes anew
    timeline.json               the predicted step of the last graph (`zgraph.cost.TimelineRecord`), and a digest
    sources.json                the user's lines that the nodes come from: file, number, text; a file may lack it

A pass that changed nothing has no separate text: the list names the one that it left as it was. The plan is not in
the file: it follows from the last graph (`zgraph.passes.make_plan`). So does the timeline, which is there because it
takes seconds to simulate. A file may lack it, and where its digest is not that of the last graph and the context, as
after an edit, it is simulated anew.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.bridge.private_files import drafted
from zgraph.certify.record import Certificate
from zgraph.cost import Timeline, TimelineRecord, simulate
from zgraph.errors import ContractError, GraphNameError, RunFileError, SimulationError, did_you_mean
from zgraph.ir import Graph, Phase, Plan, parse_graph, print_graph
from zgraph.ir.lines import unique_names
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.core.pipeline import print_pass, uncollected
from zgraph.passes.plan.make_plan import make_plan
from zgraph.runfile.archive import opened
from zgraph.runfile.sources import Sources, print_sources, read_sources
from zgraph.version import __version__

FORMAT = 2
"""In 1, types did not say which reduction is pending."""

CAPTURED = "captured"

_AGAIN = "write it again with zgraph trace"

Ran = tuple[str, Graph, float]
"""A step as the recipe writes it, the graph after it, and its seconds."""

MANIFEST = "run.json"

TIMELINE = "timeline.json"

CERTIFICATE = "certificate.json"

SOURCES = "sources.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Provenance(_Frozen):
    """Who made a file: the model's class, versions, when (UTC), and how a model that was traced was captured."""

    model: str
    zgraph: str = __version__
    torch: str = ""
    captured: str = ""
    python: str = platform.python_version()
    made: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Snapshot(_Frozen):
    """One graph of a run: the pass that made it as the recipe writes it, its text's name, seconds, and nodes."""

    step: str
    member: str
    seconds: float = Field(ge=0)
    num_nodes: int = Field(ge=0)


class Manifest(_Frozen):
    """Contents of `run.json`."""

    format: Literal[2] = 2
    provenance: Provenance
    context: Context
    snapshots: tuple[Snapshot, ...] = Field(min_length=1)


class _Predicted(_Frozen):
    """Contents of `timeline.json`: the timeline, and the digest of what it was simulated from."""

    digest: str
    timeline: TimelineRecord


@dataclass(frozen=True)
class RunFile:
    """A run: what was captured, what every pass made of it, and what the passes knew.

    Args:
        manifest: all but the graphs.
        texts: the graphs' texts by the names of their members.
        predicted: the text of `timeline.json`; empty where a file has none.
        sources: the user's lines, which are never read from where the graphs say that they lie.
        certificate: what the file says was checked of its graphs; None where it says nothing.
    """

    manifest: Manifest
    texts: dict[str, str]
    predicted: bytes = b""
    sources: Sources = field(default_factory=dict)
    certificate: Certificate | None = None
    _graphs: dict[str, Graph] = field(default_factory=dict, repr=False, compare=False)

    @property
    def context(self) -> Context:
        return self.manifest.context

    @property
    def recipe(self) -> str:
        return ",".join(s.step for s in self.manifest.snapshots[1:])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each graph: that of the pass that made it, with #2 where that ran a second time."""
        return graph_names(snapshot.step for snapshot in self.manifest.snapshots)

    @property
    def steps(self) -> list[Ran]:
        """The steps that ran, each with its graph and seconds."""
        return [(s.step, self.graph_of(s.member), s.seconds) for s in self.manifest.snapshots]

    def graph(self, name: str = "final") -> Graph:
        """The graph after a pass: its name (`bucket`, `dce#2`), a position (0 is what was captured), or `final`.

        Raises:
            GraphNameError: there is no such graph; the message has the nearest name.
            ZirError: its text does not parse.
        """
        return self.graph_of(self.member(name))

    def graph_of(self, member: str) -> Graph:
        """The graph of a text. Raises ZirError if it does not parse."""
        if member not in self._graphs:
            with uncollected():
                self._graphs[member] = parse_graph(self.texts[member])
        return self._graphs[member]

    def member(self, name: str) -> str:
        """The member that holds a graph's text, by the graph's name. Raises GraphNameError if there is none."""
        return self.manifest.snapshots[self.position(name)].member

    def position(self, name: str) -> int:
        """Position of a graph among all of them. Raises GraphNameError if there is none of that name."""
        if name == "final":
            return len(self.names) - 1
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and len(name) < 6 and int(name) < len(self.names):
            return int(name)
        hint = did_you_mean(name, [*self.names, "final"], f"there are {', '.join(self.names)} and final")
        raise GraphNameError(f"the run has no graph called {name[:60]!r}; {hint}")

    @cached_property
    def stated(self) -> Timeline | None:
        """The predicted step that the file has of its last graph; None where it has none.

        Raises:
            RunFileError: it is damaged.
        """
        if not self.predicted:
            return None
        try:
            found = _Predicted.model_validate_json(self.predicted)
        except ValidationError as error:
            raise RunFileError(f"{TIMELINE} is damaged: {_problems(error)}; {_AGAIN}") from None
        return found.timeline.timeline() if found.digest == self._digest() else None

    @cached_property
    def timeline(self) -> Timeline | None:
        """The predicted step of the last graph; None where it cannot be planned.

        Raises:
            RunFileError: the file's own is damaged.
            ZirError: there is none for this graph, and its text does not parse.
        """
        if self.stated is not None:
            return self.stated
        try:
            return simulate(make_plan(self.graph(), only_step=True), self.context.costs, self.context.hints)
        except (ContractError, SimulationError):
            return None

    def step(self, name: str = "final") -> tuple[Plan, Timeline]:
        """The plan of a graph, and its predicted step.

        Raises:
            RunFileError, ZirError: as `graph` does, or the file's timeline is damaged.
            ContractError: the graph cannot be planned yet.
            SimulationError: it would deadlock.
        """
        plan = make_plan(self.graph(name), only_step=True)
        known = self.timeline if self.member(name) == self.member("final") else None
        return plan, known or simulate(plan, self.context.costs, self.context.hints)

    def with_timeline(self) -> RunFile:
        """The same run, whose file says what the step is predicted to be."""
        if self.timeline is None:
            return self
        predicted = _Predicted(digest=self._digest(), timeline=TimelineRecord.of(self.timeline))
        return replace(self, predicted=predicted.model_dump_json().encode())

    def _digest(self) -> str:
        """A hash of what a timeline follows from."""
        known = self.manifest.model_dump_json(include={"context"}) + self.texts[self.member("final")]
        return hashlib.sha256(known.encode()).hexdigest()

    def save(self, target: Path | BinaryIO) -> None:
        """Write the file: as a whole or not at all."""
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with drafted(target) as stream:
                self._write(stream)
        else:
            self._write(target)

    def _write(self, stream: BinaryIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            archive.writestr(MANIFEST, self.manifest.model_dump_json(indent=1) + "\n")
            for member, text in self.texts.items():
                archive.writestr(member, text)
            if self.predicted:
                archive.writestr(TIMELINE, self.predicted)
            if self.certificate is not None:
                archive.writestr(CERTIFICATE, self.certificate.model_dump_json())
            if self.sources:
                archive.writestr(SOURCES, print_sources(self.sources))


def load_run(source: Path | BinaryIO) -> RunFile:
    """Read a file that `RunFile.save` wrote. The graphs are parsed when they are asked for.

    Raises:
        RunFileError: it cannot be read, is damaged, is none of ours, of a later format, or holds more than a run does.
    """
    name = str(source) if isinstance(source, Path) else "the input"
    with opened(source, name) as archive:
        manifest = _manifest(archive.read(MANIFEST), name)
        members = dict.fromkeys(snapshot.member for snapshot in manifest.snapshots)
        texts = {member: archive.read(member, is_graph=True).decode() for member in members}
        predicted = archive.read(TIMELINE) if TIMELINE in archive.members else b""
        sources = read_sources(archive.read(SOURCES)) if SOURCES in archive.members else {}
        certificate = _certificate(archive.read(CERTIFICATE), name) if CERTIFICATE in archive.members else None
    return RunFile(manifest, texts, predicted, sources, certificate)


def _certificate(text: bytes, name: str) -> Certificate:
    try:
        return Certificate.model_validate_json(text)
    except ValidationError as error:
        raise RunFileError(f"{name} is damaged: {CERTIFICATE}: {_problems(error)}; {_AGAIN}") from None


def _manifest(text: bytes, name: str) -> Manifest:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"{name} is damaged: {MANIFEST} is no JSON ({error})") from None
    if isinstance(found, dict) and isinstance(number := found.get("format", FORMAT), int) and number != FORMAT:
        remedy = "install a newer one" if number > FORMAT else _AGAIN
        raise RunFileError(f"{name} has format {number}, and this zgraph reads {FORMAT}: {remedy}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise RunFileError(f"{name} is no run file: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])


def graph_names(steps: Iterable[str]) -> tuple[str, ...]:
    """The names of the graphs after these steps."""
    return tuple(unique_names(step.partition("(")[0] for step in steps))


def has_backward(graph: Graph) -> bool:
    """Whether a graph is that of a training step."""
    return any(node.phase is Phase.backward for node in graph.nodes)


def last_graph(run: RunFile, captured: Graph, context: Context) -> Graph:
    """The last graph of a run, for a model that was captured as the run's was.

    Raises:
        RunFileError: the ranks are others, or the graphs that were captured differ; the message has the first line.
    """
    if run.context.mesh != context.mesh:
        here, there = (" x ".join(str(a.size) for a in c.mesh) or "1" for c in (context, run.context))
        raise RunFileError(f"the run file is for {there} ranks, and here are {here}; trace the model for these")
    texts = (print_graph(g, origins=False).splitlines()[1:] for g in (captured, run.graph(CAPTURED)))
    for number, (ours, theirs) in enumerate(zip_longest(*texts, fillvalue="(the end)")):
        if ours != theirs:
            raise RunFileError(
                f"the run file is of another model, or of other inputs or options: line {number + 2} is\n  {ours}\n"
                f"here, and there\n  {theirs}\nTrace this one, or compile without the file"
            )
    return run.graph()


@dataclass
class Recording:
    """An instrument that keeps the graph after every pass, for a file.

    Args:
        captured: what the passes are given.
        steps: what they made of it.
        sources: the user's lines; `sources_of(captured)` where it was captured here.
    """

    captured: Graph
    steps: list[Ran] = field(default_factory=list)
    sources: Sources = field(default_factory=dict)

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        self.steps.append((print_pass(step), after, seconds))

    def run_file(self, provenance: Provenance, context: Context, certificate: Certificate | None = None) -> RunFile:
        """The recording as a run file, with its timeline and what was checked."""
        steps = [(CAPTURED, self.captured, 0.0), *self.steps]
        run = run_file(steps, provenance, context, self.sources).with_timeline()
        return replace(run, certificate=certificate)


def run_file(steps: Sequence[Ran], provenance: Provenance, context: Context, sources: Sources | None = None) -> RunFile:
    """A run of these graphs: each with the pass that made it and its seconds, what was captured first."""
    snapshots: list[Snapshot] = []
    texts: dict[str, str] = {}
    graphs: dict[str, Graph] = {}
    written: tuple[Graph | None, str] = None, ""
    for number, (step, graph, seconds) in enumerate(steps):
        if graph != written[0]:
            member = f"graphs/{number:02d}-{step.partition('(')[0]}.zir"
            texts[member], graphs[member] = print_graph(graph), graph
            written = graph, member
        snapshots.append(Snapshot(step=step, member=written[1], seconds=seconds, num_nodes=len(graph.nodes)))
    manifest = Manifest(provenance=provenance, context=context, snapshots=tuple(snapshots))
    return RunFile(manifest, texts, sources=sources or {}, _graphs=graphs)
