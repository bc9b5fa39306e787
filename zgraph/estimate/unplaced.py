"""The samples of a model before they are placed: what all stages of a plan share, found once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from zgraph.cost.memory import local_bytes
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.ir import Graph, Phase
from zgraph.ir.aliases import Memory
from zgraph.passes import Context, Pass, Pipeline
from zgraph.passes.analysis.lookahead import step_memory
from zgraph.passes.canonicalize import Canonicalize
from zgraph.passes.fuse import Fuse
from zgraph.passes.fusion.loss import loss_nodes


class Unplaced:
    """The samples before they are placed.

    Args:
        samples: the model.
        context: of its passes; no more than its costs and hints is looked at.
    """

    def __init__(self, samples: LayerSamples, context: Context) -> None:
        self.samples, self.context = samples, context
        self._ready: dict[tuple[Pass, ...], LayerSamples] = {}
        self._kept: dict[tuple[Pass, ...], list[dict[str, int]]] = {}
        self._logit_bytes: float | None = None

    def ready(self, steps: Sequence[Pass]) -> tuple[LayerSamples, tuple[Pass, ...]]:
        """The samples after the first passes of a recipe, which know of no placement, and the passes that are left."""
        first = _first(steps)
        if first not in self._ready:
            self._ready[first] = self.samples.changed(lambda graph: Pipeline(first).run(graph, self.context))
        return self._ready[first], tuple(steps[len(first) :])

    def read_later(self, steps: Sequence[Pass]) -> list[dict[str, int]]:
        """For each sample after these passes, the bytes of each parameter that forward and backward read, by name."""
        first = _first(steps)
        if first not in self._kept:
            samples, _ = self.ready(steps)
            self._kept[first] = [_read_later(graph) for graph in samples.members]
        return self._kept[first]

    @property
    def logit_bytes(self) -> float:
        """Bytes of the whole model that are alive at its loss, where that is no fused one."""
        if self._logit_bytes is None:
            alive = []
            for captured in self.samples.members:
                graph = Canonicalize().run(captured, self.context)
                loss = loss_nodes(graph)
                moments = step_memory(graph, self.context).moments if loss else ()
                alive.append(max((m.total_bytes for m in moments if m.node in loss), default=0))
            self._logit_bytes = self.samples.scale(alive)
        return self._logit_bytes


def _first(steps: Sequence[Pass]) -> tuple[Pass, ...]:
    return tuple(takewhile(lambda step: isinstance(step, Canonicalize | Fuse), steps))


def _read_later(graph: Graph) -> dict[str, int]:
    memory = Memory(graph)
    read = {
        phase: {root for node in graph.phase_nodes(phase) for v in node.operands for root in memory.roots(v.name)}
        for phase in (Phase.forward, Phase.backward)
    }
    return {
        entry.target: local_bytes(entry.value.type, graph.mesh, {})
        for entry in graph.params
        if entry.value.tensor.shape and all(entry.value.name in names for names in read.values())
    }
