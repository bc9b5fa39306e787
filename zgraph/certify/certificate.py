"""A certificate: which rules hold of which graphs of a run, how many nodes they were checked on, and how long it took.

Nothing of a pass is believed. Every graph is compared with the one before it, which is transitive, so that the last one
computes what was captured; what breaks a rule is a `VerifyError` that names the rule, the node and the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter

from pydantic import BaseModel, ConfigDict, Field

from zgraph.certify.derived import Derived
from zgraph.certify.equality import Equality, Programs
from zgraph.certify.ownership import at_rest, gathers, gradients, owned, under_way
from zgraph.errors import VerifyError
from zgraph.ir import DType, Graph, verify
from zgraph.ir.verifier import Fault, describe
from zgraph.passes.base import Pass

_FUSES = "fuse"


class Checked(BaseModel):
    """One rule on one graph: the nodes that it was checked on, and seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    rule: str
    num_nodes: int = Field(ge=0)
    seconds: float = Field(ge=0)


class Certificate(BaseModel):
    """What was checked of a run. A file's own is a claim; `zgraph verify` makes it anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checked: tuple[Checked, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.checked)

    @property
    def lines(self) -> Iterator[str]:
        """A line for each rule: on how many graphs and nodes it holds."""
        for rule in dict.fromkeys(c.rule for c in self.checked):
            some = [c for c in self.checked if c.rule == rule]
            nodes, seconds = sum(c.num_nodes for c in some), sum(c.seconds for c in some)
            yield f"{rule}: {len(some)} graphs, {nodes:,} nodes, {1e3 * seconds:,.0f} ms"


class Certifier:
    """Checks the graphs of a run as they come. It is an instrument of a pipeline.

    Args:
        captured: the graph that all others must equal.
        reduce_dtype: the dtype in which gradients are averaged; None takes the one that they come in.
        hints: a number for each symbolic size.
        thorough: check the rules of the IR, and derive types, for each graph; else for the first and the last.
    """

    def __init__(
        self, captured: Graph, reduce_dtype: DType | None, hints: Mapping[str, int], *, thorough: bool = True
    ) -> None:
        self.equality, self.derived = Equality(captured, reduce_dtype), Derived(hints)
        self.thorough, self.checked = thorough, list[Checked]()
        self.released = self.placed = False
        self.last, self.name = captured, "captured"
        self.rules(captured)
        self.known = self.equality.programs(captured)

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Check what a pass has made."""
        self.check(step.name, after)

    def check(self, step: str, graph: Graph) -> None:
        """Check the next graph.

        Args:
            step: the name of the pass that made it.

        Raises:
            VerifyError: it breaks a rule.
        """
        self.name = step
        self.released |= step == "release"
        if graph is not self.last and graph != self.last:
            if self.thorough:
                self.rules(graph)
            known: list[Programs] = []

            def equal() -> Iterator[Fault]:
                known.append(self.equality.programs(graph))
                if step != _FUSES:
                    yield from self.equality.faults(self.known, known[0], step)

            self.run("fused kernels: not compared" if step == _FUSES else "equality", graph, equal())
            self.known = known[0]
        self.last = graph
        if self.thorough:
            self.order(graph)

    def finish(self) -> Certificate:
        """The certificate of all graphs so far, of which the last one runs."""
        if not self.thorough:
            self.rules(self.last)
            self.order(self.last)
        return Certificate(checked=tuple(self.checked))

    def rules(self, graph: Graph) -> None:
        """The rules that any graph keeps to."""
        began = perf_counter()
        try:
            verify(graph)
        except VerifyError as error:
            raise VerifyError(f"{self.place}: {error}") from None
        self.checked.append(
            Checked(graph=self.name, rule="ir", num_nodes=len(graph.nodes), seconds=perf_counter() - began)
        )
        self.run("types and effects", graph, self.derived.faults(graph))

    def order(self, graph: Graph) -> None:
        """The rules of graphs that are placed."""
        wanted: dict[str, Callable[[Graph], Iterator[Fault]]] = {
            "placement at rest": at_rest, "gradients": gradients, "gathers": gathers, "order": under_way,
        }  # fmt: skip
        if self.released:
            wanted["ownership"] = owned
        for rule, found in wanted.items():
            self.run(rule, graph, found(graph))

    def run(self, rule: str, graph: Graph, faults: Iterable[Fault]) -> None:
        began = perf_counter()
        for position, message in faults:
            raise VerifyError(f"{self.place}: {describe(graph, rule, position, message)}")
        self.checked.append(
            Checked(graph=self.name, rule=rule, num_nodes=len(graph.nodes), seconds=perf_counter() - began)
        )

    @property
    def place(self) -> str:
        return f"the graph after {self.name}" if self.name != "captured" else "the captured graph"


def certify(
    steps: Iterable[tuple[str, Graph]], reduce_dtype: DType | None, hints: Mapping[str, int], *, thorough: bool = True
) -> Certificate:
    """Check the graphs of a run, what was captured first.

    Args:
        steps: the name of each pass with the graph after it.
        reduce_dtype: the dtype in which gradients are averaged over ranks; None takes their own.
        hints: a number for each symbolic size.
        thorough: whether graphs between the first and the last are checked for more than equality.

    Raises:
        VerifyError: a graph breaks a rule; the message names it, the node, and the user's line.
    """
    (_, captured), *others = steps
    certifier = Certifier(captured, reduce_dtype, hints, thorough=thorough)
    for name, graph in others:
        certifier.check(name, graph)
    return certifier.finish()
