"""When gradients are averaged: at stage 1 once, when the step ends; at the others in the backward that makes them.

No numbers show it, as the sum of means is the mean of sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from zgraph.ir import OPS, Graph, Node, Output, OutputKind, Phase

_REDUCES = (o.name for o in OPS.values() if o.transfer and o.transfer.reduces)
_AVERAGES = frozenset({"reshard", "accumulate", "encode", "decode", *_REDUCES})


def misplaced(graph: Graph, own: Collection[int] = ()) -> Iterator[tuple[int, str]]:
    """Outputs of a placed graph that are averaged in another phase than their stage says, and how.

    Args:
        graph: after any pass.
        own: positions of outputs that each rank still has its own of.
    """
    stages = {i.value.name: i.stage for i in graph.params}
    for index, output in enumerate(graph.outputs):
        stage = stages.get(output.target)
        if not graph.mesh or index in own or output.kind is not OutputKind.grad or stage is None:
            continue
        wanted = Phase.update if stage == 1 else Phase.backward
        for node in _averaging(graph, output):
            if node.phase is not wanted:
                yield index, f"{node.op} of %{node.operands[0].name} is in {node.phase.value}, not in {wanted.value}"
                break


def _averaging(graph: Graph, output: Output) -> Iterator[Node]:
    """The nodes that average a gradient, from the output back to where it is whole on each rank."""
    waiting = [] if output.value is None else [output.value.name]
    seen = set(waiting)
    while waiting:
        node = graph.producers.get(waiting.pop())
        if node is None or node.op not in OPS:
            continue
        if node.op in _AVERAGES:
            yield node
        more = {v.name for v in node.operands} - seen if node.op != "accumulate" else set()
        seen |= more
        waiting += more
