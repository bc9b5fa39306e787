"""Where a parameter of a run lies, why, and what it would cost elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from zgraph.errors import PlacementError
from zgraph.ir import Axis, Graph, Input, Placement, Replicate, model_axes
from zgraph.passes.canonicalize import Canonicalize
from zgraph.passes.placements import Alternative, Search
from zgraph.runfile.format import CAPTURED, RunFile

__all__ = ["Weight", "explain_weight"]

TENSOR = "tensor"


@dataclass(frozen=True)
class Weight:
    """A parameter of a run.

    Args:
        entry: of the last graph.
        captured: the graph that was captured.
        final: the last graph.
        run: the run.
    """

    entry: Input
    captured: Graph
    final: Graph
    run: RunFile

    def place(self, axis: Axis, name: str = "") -> Placement:
        """Where a parameter lies along a model axis; this one by default."""
        index = self.final.mesh.index(axis)
        entry = next(i for i in self.final.params if i.value.name == (name or self.entry.value.name))
        return entry.value.tensor.placement[index]

    @property
    def at_rest(self) -> str:
        """Type of a rank's part at rest, and the stage."""
        stage = "" if self.entry.stage is None else f", stage {self.entry.stage}"
        return f"{self.entry.value.type}{stage}"

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The placements along the axis of tensor parallelism, the cheapest first, each with what a step takes more
        than with the cheapest; none without such an axis.

        Parameters of the same name in other layers go with it, all others are where they are.
        """
        axis = next((a for a in model_axes(self.final.mesh) if a.name == TENSOR), None)
        if axis is None:
            return ()
        graph = Canonicalize().run(self.captured, self.run.context)
        name, own = self.entry.value.name, _unnumbered(self.entry.target)
        fixed = [i.value.name for i in graph.params if _unnumbered(i.target) != own]
        others = {other: self.place(axis, other) for other in fixed}
        search = Search(graph, axis, self.run.context, others)
        return (Alternative(search.found.places[name], 0.0), *search.alternatives(name))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it lies where it does along each axis along which ranks compute together, in words."""
        found = []
        for axis in model_axes(self.final.mesh):
            place = self.place(axis)
            if axis.name == TENSOR:
                found.append(f"{place} along {axis.name}: {self._priced(place)}")
            elif place == Replicate():
                found.append(f"{place} along {axis.name}: whole on its {axis.size} ranks, as no dim of it divides")
            else:
                found.append(
                    f"{place} along {axis.name}: sharded at rest over {axis.size} ranks, gathered where it is used"
                )
        return tuple(found)

    def _priced(self, place: Placement) -> str:
        try:
            priced = {found.place: found.more_us for found in self.alternatives}
        except PlacementError as error:
            return f"not searched: {error}"
        others = {other: us for other, us in priced.items() if other != place}
        if place not in priced:
            return "as it was stated; no op passes this cut, so that it is gathered whole"
        if not others:
            return "there is no other way"
        nearest = min(others, key=lambda other: others[other])
        more = others[nearest] - priced[place]
        beside = f"the next best, {nearest}, takes {abs(more):,.1f} us {'more' if more >= 0 else 'less'} a step"
        return f"{beside}, nothing hidden behind anything else"


def _unnumbered(name: str) -> str:
    """A name without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".", name)


def explain_weight(run: RunFile, name: str) -> Weight | None:
    """Facts of a run about a parameter; None if it has none of this name.

    Args:
        run: the run.
        name: in the model, or of its value in the graph.
    """
    final = run.graph()
    wanted = name.removeprefix("%")
    entry = next((i for i in final.params if wanted in (i.target, i.value.name)), None)
    return None if entry is None else Weight(entry, run.graph(CAPTURED), final, run)
