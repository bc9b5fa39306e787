"""Parts of a drawing of a graph: one box for each input, node and output, in scopes named after modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from zgraph.ir import Graph, Input, InputKind, Instruction, Node, Phase, Value, print_node

COLOURS = {
    "": "#eeeeee",
    "compute": "#dceaf7",
    "comm": "#fbd9b5",
    "d2h": "#d9ecd0",
    "h2d": "#cfe8e4",
}
"""The colour of each lane; inputs and outputs are on none."""

PHASES = {Phase.forward: "forward", Phase.backward: "backward", Phase.update: "update"}


@dataclass(frozen=True)
class Box:
    """One input, node or output.

    Args:
        name: unique in its graph.
        label: what is written on it.
        scope: the phase, then the path of the module, from the outermost in.
        lane: what runs it; "" for inputs and outputs.
        reads: values that lead into it.
        makes: values that lead out of it.
        details: what else is known of it, by title.
    """

    name: str
    label: str
    scope: tuple[str, ...]
    lane: str = ""
    reads: tuple[Value, ...] = ()
    makes: tuple[Value, ...] = ()
    details: dict[str, str] = field(default_factory=dict)

    @property
    def colour(self) -> str:
        return COLOURS[self.lane]


def boxes(graph: Graph) -> Iterator[Box]:
    """The boxes of a graph, each after those that it reads from."""
    yield from map(_input_box, graph.inputs)
    for position, node in enumerate(graph.nodes):
        yield _node_box(node, position)
    for position, output in enumerate(graph.outputs):
        if output.value is not None:
            label = f"{output.kind.value} {output.target}".strip()
            yield Box(f"return#{position}", label, ("outputs",), reads=(output.value,))


def details(node: Node) -> dict[str, str]:
    """The module, the line and the pass that a node comes from, as far as they are known."""
    origin = node.origin
    found = {"module": origin.module, "source": origin.place, "made by": origin.made_by}
    return {title: text for title, text in found.items() if text}


def _input_box(entry: Input) -> Box:
    is_param = entry.kind is InputKind.param
    scope = ("parameters", *_path(entry.target)[:-1]) if is_param else ("inputs",)
    label = entry.target or entry.value.name
    return Box(entry.value.name, label, scope, makes=(entry.value,), details={"kind": entry.kind.value})


def _node_box(node: Node, position: int) -> Box:
    return Box(
        node.name if node.results else f"{node.op}#{position}",
        node.op,
        (PHASES[node.phase], *_path(node.origin.module)),
        Instruction(node).lane,
        node.operands,
        node.results,
        {**details(node), "text": print_node(node, origins=False)},
    )


def _path(module: str) -> tuple[str, ...]:
    return tuple(part for part in module.split(".") if part)
