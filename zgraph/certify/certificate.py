"""Certificates: which rules hold of which graphs of a run, on how many nodes, and how long it took to check them.

Nothing of a pass is believed. Every graph is compared with the one before it, which is transitive, so that the last one
computes what was captured; what breaks a rule is a `VerifyError` that names the rule, the node and the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter

from zgraph.certify.derived import Derived
from zgraph.certify.equality import Equality, Programs
from zgraph.certify.ownership import at_rest, gathers, gradients, owned, under_way
from zgraph.certify.record import Certificate, Checked
from zgraph.errors import VerifyError
from zgraph.ir import DType, Graph, verify
from zgraph.ir.verifier import Fault, describe
from zgraph.passes.base import Pass

FUSES = "fuse"
"""The pass that puts kernels in the place of ops: what follows is compared with the graph that it made."""

PLACED: Mapping[str, Callable[[Graph], Iterator[Fault]]] = {
    "placement at rest": at_rest, "gradients": gradients, "gathers": gathers, "order": under_way,
}  # fmt: skip
"""The rules of graphs that are placed."""


class Certifier:
    """Checks the graphs of a run. It is an instrument of a pipeline.

    Args:
        captured: the graph that all others must equal.
        reduce_dtype: the dtype in which gradients are averaged; None takes the one that they come in.
        hints: a number for each symbolic size.
        thorough: check every graph for everything; else the last one, which says as much of what runs, and every graph
            only where it is wrong, to name the pass.
    """

    def __init__(
        self, captured: Graph, reduce_dtype: DType | None, hints: Mapping[str, int], *, thorough: bool
    ) -> None:
        self.reduce_dtype, self.hints, self.thorough = reduce_dtype, hints, thorough
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
        check = _Check(self.reduce_dtype, None)
        last = len(self.steps) - 1
        base = max((i for i, (step, _) in enumerate(self.steps) if step == FUSES), default=0)
        try:
            check.begin(*self.steps[base])
            if last > base and self.steps[last][1] != self.steps[base][1]:
                check.compare(self.steps[last][0], self.steps[last][1], places=True)
            check.rules(self.steps[last][1])
            check.placed(self.steps[last][1], released=any(step == "release" for step, _ in self.steps))
        except VerifyError:
            self.each()  # names the pass
            raise
        return Certificate(checked=tuple(check.checked))

    def each(self) -> Certificate:
        """Check every graph, each against the one before it."""
        check = _Check(self.reduce_dtype, Derived(self.hints))
        check.begin(*self.steps[0])
        check.rules(self.steps[0][1])
        placed = released = False
        for step, graph in self.steps[1:]:
            released |= step == "release"
            placed |= step == "partition" or graph.inputs != self.steps[0][1].inputs
            changed = graph is not check.graph and graph != check.graph
            if changed:
                check.name = step
                check.rules(graph)
                if step == FUSES:
                    check.begin(step, graph)
                else:
                    check.compare(step, graph)
            if placed and (changed or step == "release"):
                check.placed(graph, released=released)
        return Certificate(checked=tuple(check.checked))


class _Check:
    """Checks graphs, and notes what was checked."""

    def __init__(self, reduce_dtype: DType | None, derived: Derived | None) -> None:
        self.reduce_dtype, self.derived = reduce_dtype, derived
        self.checked: list[Checked] = []
        self.name = ""

    def begin(self, step: str, graph: Graph) -> None:
        """Compare what follows with this graph."""
        self.name, self.graph = step, graph
        self.equality = Equality(graph, self.reduce_dtype)
        self.known: Programs = self.equality.programs(graph)

    def compare(self, step: str, graph: Graph, *, places: bool = False) -> None:
        """Whether a graph computes what the last one did; `places` if passes of any kind may lie between them."""
        self.name = step

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
        for rule, found in PLACED.items():
            self.run(rule, graph, found(graph))
        if released:
            self.run("ownership", graph, owned(graph))

    def run(self, rule: str, graph: Graph, faults: Iterable[Fault]) -> None:
        began = perf_counter()
        for position, message in faults:
            raise VerifyError(f"{self.place}: {describe(graph, rule, position, message)}")
        self.note(rule, graph, began)

    def note(self, rule: str, graph: Graph, began: float) -> None:
        seconds = perf_counter() - began
        self.checked.append(Checked(graph=self.name, rule=rule, num_nodes=len(graph.nodes), seconds=seconds))

    @property
    def place(self) -> str:
        return f"the graph after {self.name}" if self.name != "captured" else "the captured graph"


def certify(steps: Iterable[tuple[str, Graph]], reduce_dtype: DType | None, hints: Mapping[str, int]) -> Certificate:
    """Check every graph of a run.

    Args:
        steps: the name of each pass with the graph after it, what was captured first.
        reduce_dtype: the dtype in which gradients are averaged over ranks; None takes their own.
        hints: a number for each symbolic size.

    Raises:
        VerifyError: a graph breaks a rule; the message names it, the node, and the user's line.
    """
    (_, captured), *others = steps
    certifier = Certifier(captured, reduce_dtype, hints, thorough=True)
    for name, graph in others:
        certifier.add(name, graph)
    return certifier.finish()
