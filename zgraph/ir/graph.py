"""The graph: an immutable list of nodes in SSA form, with typed inputs and outputs and a phase on each node."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Union

from zgraph.ir.types import Axis, DType, Placement, TensorType, Type, num_ranks, num_shards

__all__ = [
    "Arg",
    "ExternalOp",
    "Graph",
    "Input",
    "InputKind",
    "Node",
    "Origin",
    "Output",
    "OutputKind",
    "Phase",
    "Token",
    "Value",
    "graphs_in",
    "map_values",
    "values_in",
]


class Phase(enum.Enum):
    """When a node runs: in the forward, in the backward, or once a step after the last backward."""

    forward = "fwd"
    backward = "bwd"
    update = "upd"

    @property
    def rank(self) -> int:
        return _PHASES.index(self)


_PHASES = (Phase.forward, Phase.backward, Phase.update)

PROGRAMS = (Phase.forward, Phase.backward)
"""The programs of a step: the forward, and the backward with all that follows it."""


@dataclass(frozen=True, slots=True)
class Value:
    """One SSA value: a name, unique in its graph, and a type."""

    name: str
    type: Type

    @property
    def tensor(self) -> TensorType:
        """The type, where it must be a tensor's."""
        if not isinstance(self.type, TensorType):
            raise TypeError(f"%{self.name} is {self.type}, not a tensor")
        return self.type

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class Token:
    """A constant of the host framework that zgraph passes through by name: a device, layout or memory format."""

    kind: str
    name: str


Arg = Union[Value, DType, Token, "Graph", int, float, bool, str, None, tuple["Arg", ...]]
"""An argument; a graph is a function that a higher-order op calls."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: the module path, the user's file and line, and the pass that put it there."""

    module: str = ""
    file: str = ""
    line: int = 0
    made_by: str = ""

    @property
    def place(self) -> str:
        """The user's file and line, `model.py:12`; empty where they are not known."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def layer(self) -> str:
        """The path of the layer that the module is part of: up to the first number in it.

        >>> Origin("model.layers.3.mlp.up").layer, Origin("model.norm").layer
        ('model.layers.3', '')
        """
        parts = self.module.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return "" if number is None else ".".join(parts[: number + 1])


@dataclass(frozen=True, slots=True)
class Node:
    """One op applied to arguments, giving zero or more results.

    `checkpoint` numbers the region of the forward that the user wants computed again; 0 for none. `operands` are all
    values that the node reads, in order, repeats kept.
    """

    op: str
    args: tuple[Arg, ...]
    results: tuple[Value, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    phase: Phase = Phase.forward
    origin: Origin = Origin()
    checkpoint: int = 0
    operands: tuple[Value, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = tuple(values_in((self.args, tuple(a for _, a in self.kwargs))))
        object.__setattr__(self, "operands", found)

    @property
    def name(self) -> str:
        """The name of the first result, or the op's where there is none: what errors and reports call the node."""
        return self.results[0].name if self.results else self.op

    def option(self, key: str) -> Arg:
        """The keyword argument `key`, or None."""
        return next((arg for name, arg in self.kwargs if name == key), None)

    def substitute(self, env: Mapping[str, Value]) -> Node:
        """The node reading `env[name]` wherever it read the value called `name`."""
        if not env or not any(v.name in env for v in self.operands):
            return self
        args = tuple(map_values(a, env) for a in self.args)
        return replace(self, args=args, kwargs=tuple((k, map_values(a, env)) for k, a in self.kwargs))


class InputKind(enum.Enum):
    param = "param"
    buffer = "buffer"
    input = "input"
    tangent = "tangent"
    constant = "constant"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of the graph.

    Args:
        kind: what it is. Tangents feed the backward, everything else the forward.
        value: the SSA value.
        target: the name in the model of a parameter, buffer or lifted constant.
        stage: for a parameter, the ZeRO stage wanted for it; None leaves it to the recipe.
        master: for a parameter, the dtype of its master copy where that is not the dtype it is computed with.
        offload: for a parameter, what of it is on the host: nothing; `optimizer`: its master, gradient and optimizer
            state, while a copy to compute with stays on the device; `parameters`: that copy too.
        cuts: for a parameter, the placements wanted for it along model axes, with the axes' names.
    """

    kind: InputKind
    value: Value
    target: str = ""
    stage: int | None = None
    master: DType | None = None
    offload: str = ""
    cuts: tuple[tuple[str, Placement], ...] = ()


class OutputKind(enum.Enum):
    output = "output"
    mutation = "mutation"
    grad = "grad"


@dataclass(frozen=True, slots=True)
class Output:
    """An output of the graph, in the order the host framework wants them.

    `value` is None for an output that does not exist (no gradient). `target` names the input whose new value (a
    mutation) or whose gradient this is.
    """

    kind: OutputKind
    value: Value | None
    target: str = ""
    phase: Phase = Phase.forward

    def substitute(self, env: Mapping[str, Value]) -> Output:
        """The output with `env[name]` in the place of the value called `name`."""
        return replace(self, value=env[self.value.name]) if self.value is not None and self.value.name in env else self


@dataclass(frozen=True, slots=True)
class ExternalOp:
    """Properties of an op that is not zgraph's own, read off its schema at capture.

    Args:
        views: positions of arguments that the results may share memory with.
        writes: positions of arguments that it writes to.
        random: it draws from the random number generator.
        multi: it returns a tuple or list, one result an element.
        opaque: its effects are unknown, so it is neither moved, merged nor removed.
    """

    views: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    random: bool = False
    multi: bool = False
    opaque: bool = False

    @property
    def is_pure(self) -> bool:
        return not (self.writes or self.random or self.opaque)

    def either(self, other: ExternalOp) -> ExternalOp:
        """Properties of an op by two calls of it."""
        return replace(self, random=self.random or other.random, opaque=self.opaque or other.opaque)


@dataclass(frozen=True)
class Graph:
    """A program over typed values. Nodes are in an order that runs: forward, then backward, then update.

    `arenas` has the bytes of each program's arena (`zgraph.ir.arena`): that of the forward, and that of the backward
    with all that follows it. Programs without one are not there.
    """

    name: str
    inputs: tuple[Input, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Output, ...] = ()
    mesh: tuple[Axis, ...] = ()
    foreign: Mapping[str, ExternalOp] = field(default_factory=dict)
    arenas: Mapping[Phase, int] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, len(self.nodes)))

    def with_nodes(self, nodes: list[Node] | tuple[Node, ...]) -> Graph:
        """The graph with `nodes` in the place of its own."""
        return replace(self, nodes=tuple(nodes))

    def with_used_ops(self) -> Graph:
        """The graph without foreign ops that no node of it is of."""
        used = {node.op for node in self.nodes}
        return replace(self, foreign={op: row for op, row in self.foreign.items() if op in used})

    @property
    def params(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.kind is InputKind.param)

    @cached_property
    def param_names(self) -> frozenset[str]:
        return frozenset(i.value.name for i in self.params)

    @cached_property
    def subgraphs(self) -> tuple[Graph, ...]:
        """The functions that its higher-order ops call, in the order in which they come, each once."""
        args = (a for n in self.nodes for a in (*n.args, *(a for _, a in n.kwargs)))
        return tuple(dict.fromkeys(graph for a in args for graph in graphs_in(a)))

    @cached_property
    def producers(self) -> Mapping[str, Node]:
        """The node that defines each value, by the value's name (inputs have none)."""
        return {r.name: n for n in self.nodes for r in n.results}

    @cached_property
    def users(self) -> Mapping[str, tuple[int, ...]]:
        """Positions of the nodes that read each value, by the value's name."""
        users: dict[str, list[int]] = {}
        for position, node in enumerate(self.nodes):
            for name in dict.fromkeys(v.name for v in node.operands):
                users.setdefault(name, []).append(position)
        return {name: tuple(at) for name, at in users.items()}

    def readers(self, *values: Value) -> list[Node]:
        """The nodes that read these values; one that reads several, once for each."""
        return [self.nodes[at] for value in values for at in self.users.get(value.name, ())]

    @cached_property
    def output_names(self) -> frozenset[str]:
        return frozenset(o.value.name for o in self.outputs if o.value is not None)

    def phase_nodes(self, phase: Phase) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if n.phase is phase)

    @property
    def num_ranks(self) -> int:
        """Ranks along all axes together; 1 without a mesh."""
        return num_ranks(self.mesh)

    @property
    def num_shards(self) -> int:
        """Parts that a sharded tensor is cut into; 1 without a mesh."""
        return num_shards(self.mesh)


def values_in(arg: Arg) -> Iterator[Value]:
    """The values inside an argument, depth first."""
    if isinstance(arg, Value):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from values_in(item)


def graphs_in(arg: Arg) -> Iterator[Graph]:
    """The functions inside an argument."""
    if isinstance(arg, Graph):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from graphs_in(item)


def map_values(arg: Arg, env: Mapping[str, Value]) -> Arg:
    """The argument with `env[name]` in the place of each value called `name`."""
    if isinstance(arg, Value):
        return env.get(arg.name, arg)
    if isinstance(arg, tuple):
        return tuple(map_values(item, env) for item in arg)
    return arg
