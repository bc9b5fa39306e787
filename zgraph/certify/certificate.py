"""Certificates: which rules hold of which graphs of a run, on how many nodes, and how long it took to check them.

Nothing of a pass is believed. Every graph is compared with the one before it, which is transitive, so that the last one
computes what was captured; what breaks a rule is a `VerifyError` that names the rule, the node and the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

from zgraph.certify import codes, float8
from zgraph.certify.budget import Limit, footprint, is_lowered, over
from zgraph.certify.derived import Derived
from zgraph.certify.equality import Equality, Programs
from zgraph.certify.memory import peak
from zgraph.certify.ownership import at_rest, gathers, gradients, not_owned, owned, under_way
from zgraph.certify.record import Certificate, Checked, Footprint
from zgraph.certify.spelled import kernels
from zgraph.errors import VerifyError
from zgraph.ir import Graph, Mesh, in_use, verify
from zgraph.ir.verifier import Fault, describe
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.partition import Partition

PLACED: Mapping[str, Callable[[Graph], Iterator[Fault]]] = {
    "placement at rest": at_rest,
    "gradients": gradients,
    "gathers": gathers,
    "order": under_way,
    "releases": not_owned,
    "codes": codes.feedback,
}
"""The rules of graphs that are placed."""


def on_mesh(graph: Graph, mesh: Mesh) -> Iterator[Fault]:
    """A graph that is placed lies on the mesh that the run is for."""
    wanted = in_use(mesh)
    if graph.mesh not in ((), wanted):
        yield None, f"lies on the mesh {_shape(graph.mesh)}, but the run is for {_shape(wanted)}"


def _shape(mesh: Mesh) -> str:
    return " x ".join(f"{axis.name}={axis.size}" for axis in mesh)


def landmarks(steps: Sequence[tuple[str, Graph]]) -> set[int]:
    """Numbers of the graphs that `Certifier.finish` compares beside the first and the last: those on both sides of a
    pass that puts kernels or products in float8 in the place of ops.

    Args:
        steps: the name of each pass with the graph after it, what was captured first.
    """
    found: set[int] = set()
    for number, ((_, before), (_, graph)) in enumerate(pairwise(steps), 1):
        if _fuses(before, graph) or _approximates(before, graph):
            found |= {number - 1, number}
    return found


def _fuses(before: Graph, graph: Graph) -> bool:
    """Whether a graph has other kernels in the place of ops than the one before it, and is not yet placed."""
    return not graph.mesh and kernels(before) != kernels(graph)


def _approximates(before: Graph, graph: Graph) -> bool:
    """Whether other products are in float8 than in the graph before it, and it is not yet placed."""
    return not graph.mesh and float8.products(before) != float8.products(graph)


class Certifier:
    """Checks the graphs of a run. It is an instrument of a pipeline.

    Args:
        captured: the graph that all others must equal.
        context: what the passes know: the mesh, the dtype of reductions, a number for each size, the memory budget.
        thorough: check every graph for everything; else the last one, which says as much of what runs, and every graph
            only where it is wrong, to name the pass.
        stated: the peak above rest that the run's own prediction has; None where it has none.
    """

    def __init__(self, captured: Graph, context: Context, *, thorough: bool, stated: int | None = None) -> None:
        self.context, self.thorough, self.stated = context, thorough, stated
        self.steps: list[tuple[str, Graph]] = [("captured", captured)]

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Take note of what a pass has made."""
        self.add(step.name, after)

    def add(self, step: str, graph: Graph) -> None:
        """Take note of the next graph: the name of the pass, and what it has made."""
        self.steps.append((step, graph))

    def finish(self) -> Certificate:
        """The certificate.

        Raises:
            VerifyError: a graph breaks a rule.
        """
        if self.thorough:
            return self.each()
        check = _Check(self.context, None)
        last_step, last = self.steps[-1]
        try:
            check.begin(*self.steps[0])
            for (before_step, before), (step, graph) in pairwise(self.steps):
                if _fuses(before, graph):
                    check.compare(before_step, before, places=True)
                    check.fused(step, before, graph)
                elif _approximates(before, graph):
                    check.compare(before_step, before, places=True)
                    check.approximated(step, before, graph)
            check.compare(last_step, last, places=True)
            check.rules(last)
            check.placed(last, released=any(step == "release" for step, _ in self.steps))
        except VerifyError:
            self.each()  # names the pass
            raise
        return self.certificate(check)

    def each(self, since: int = 0) -> Certificate:
        """Check every graph from number `since` on, each against the one before it."""
        check = _Check(self.context, Derived(self.context.hints))
        check.begin(*self.steps[0])
        if since > 1:
            check.begin_again(*self.steps[since - 1])
        else:
            check.rules(self.steps[0][1])
        placed = released = False
        inputs = self.steps[0][1].inputs
        for number, ((_, before), (step, graph)) in enumerate(pairwise(self.steps), 1):
            released |= step == "release"
            inputs = graph.inputs if step == "place" else inputs
            placed |= step == "partition" or graph.inputs != inputs
            if number < since:
                continue
            changed = graph is not before and graph != before
            if changed:
                check.name = step
                check.rules(graph)
            if placed and (changed or step == "release"):
                check.placed(graph, released=released)
            if changed and _fuses(before, graph):
                check.fused(step, before, graph)
            elif changed and _approximates(before, graph):
                check.approximated(step, before, graph)
            elif changed:
                check.compare(step, graph)
        return self.certificate(check)

    def certificate(self, check: _Check) -> Certificate:
        """Certificate of what was checked. A lowered last graph is held to the budget and gives the footprint."""
        (*_, (_, last)), names = self.steps, {step for step, _ in self.steps}
        limit = Limit.of(self.context, self.stated)
        if Partition.name not in names:
            limit = replace(limit, budget=None)  # what was captured is not yet what runs
        footprint = check.memory(last, limit, released="release" in names) if is_lowered(last) else None
        return Certificate(checked=tuple(check.checked), footprint=footprint)


class _Check:
    """Checks graphs, and notes what was checked."""

    def __init__(self, context: Context, derived: Derived | None) -> None:
        self.context, self.derived = context, derived
        self.checked: list[Checked] = []
        self.name = ""

    def begin(self, step: str, graph: Graph) -> None:
        """Compare what follows with this graph."""
        self.name, self.graph = step, graph
        self.equality = Equality(graph, self.context.reduce_dtype)
        self.known: Programs = self.equality.programs(graph)
        self.run("equality", graph, self.equality.loss_only(self.known))

    def begin_again(self, step: str, graph: Graph) -> None:
        """Compare what follows with this graph, whose inputs are those of the graph before it."""
        self.name, self.graph = step, graph
        self.known = self.equality.programs(graph)

    def fused(self, step: str, before: Graph, graph: Graph) -> None:
        """Whether the kernels compute what stood in their place; what follows is compared with this graph."""
        self.name = step
        self.run("kernels by their specification", graph, self.equality.fused(before, graph))
        self.begin_again(step, graph)

    def approximated(self, step: str, before: Graph, graph: Graph) -> None:
        """Whether a graph computes what the last one did but for float8; what follows is compared with this one."""
        self.name, rule = step, "float8 by what it approximates"
        self.run(rule, graph, float8.faults(graph))
        made = float8.without_turns(float8.in_full(graph))
        programs = [self.equality.programs(each) for each in (float8.without_turns(before), made)]
        self.run(rule, made, self.equality.faults(programs[0], programs[1], step))
        self.begin_again(step, graph)

    def compare(self, step: str, graph: Graph, *, places: bool = False) -> None:
        """Whether a graph computes what the last one did; `places` if passes of any kind may lie between them."""
        self.name = step
        if graph is self.graph or graph == self.graph:
            return

        def faults() -> Iterator[Fault]:
            known = self.equality.programs(graph)
            yield from self.equality.faults(self.known, known, "partition" if places else step)
            self.known, self.graph = known, graph

        self.run("equality", graph, faults())

    def rules(self, graph: Graph) -> None:
        """The rules that any graph keeps to."""
        began = perf_counter()
        try:
            verify(graph)
        except VerifyError as error:
            raise VerifyError(f"{self.place}: {error}") from None
        self.note("ir", graph, began)
        if self.derived is not None:
            self.run("types and effects", graph, self.derived.faults(graph))

    def placed(self, graph: Graph, *, released: bool) -> None:
        """The rules of graphs that are placed."""
        self.run("mesh", graph, on_mesh(graph, self.context.mesh))
        for rule, found in PLACED.items():
            self.run(rule, graph, found(graph))
        if released:
            self.run("ownership", graph, owned(graph))

    def memory(self, graph: Graph, limit: Limit, *, released: bool) -> Footprint:
        """Device memory of the last graph, which is checked against the budget."""
        began, hints = perf_counter(), self.context.hints
        highest = peak(graph, hints, released=released)
        found = footprint(graph, highest, limit, hints)
        self.run("budget", graph, over(graph, highest, found, limit), began)
        return found

    def run(self, rule: str, graph: Graph, faults: Iterable[Fault], began: float | None = None) -> None:
        began = perf_counter() if began is None else began
        for position, message in faults:
            raise VerifyError(f"{self.place}: {describe(graph, rule, position, message)}")
        self.note(rule, graph, began)

    def note(self, rule: str, graph: Graph, began: float) -> None:
        seconds = perf_counter() - began
        self.checked.append(Checked(graph=self.name, rule=rule, num_nodes=len(graph.nodes), seconds=seconds))

    @property
    def place(self) -> str:
        return f"the graph after {self.name}" if self.name != "captured" else "the captured graph"


def certify(
    steps: Iterable[tuple[str, Graph]], context: Context, stated: int | None = None, since: int = 0
) -> Certificate:
    """Check every graph of a run.

    Args:
        steps: the name of each pass with the graph after it, what was captured first.
        context: what the passes knew: the mesh, the dtype of reductions, a number for each size, the memory budget.
        stated: the peak above rest that the run's own prediction has; None where it has none.
        since: the number of the first graph to check; those before it are taken as checked.

    Raises:
        VerifyError: a graph breaks a rule; the message names it, the node, and the user's line.
    """
    (_, captured), *others = steps
    certifier = Certifier(captured, context, thorough=True, stated=stated)
    for name, graph in others:
        certifier.add(name, graph)
    return certifier.each(since)
