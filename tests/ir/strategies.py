"""Random valid graphs of real ATen ops, as capture gives them: forward and backward, some gradients, odd sizes.

`graphs()` is a hypothesis strategy. What it makes can be printed, compiled and (on `zgraph.interpreter`) run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from zgraph.ir import (
    Arg,
    DType,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
    TensorType,
    Token,
    Value,
)

FOREIGN = {
    "aten._to_copy.default": ExternalOp(),
    "aten.add.Tensor": ExternalOp(),
    "aten.alias.default": ExternalOp(views=(0,)),
    "aten.bernoulli.p": ExternalOp(random=True),
    "aten.clone.default": ExternalOp(),
    "aten.detach.default": ExternalOp(views=(0,)),
    "aten.expand.default": ExternalOp(views=(0,)),
    "aten.full.default": ExternalOp(),
    "aten.mm.default": ExternalOp(),
    "aten.mul.Tensor": ExternalOp(),
    "aten.neg.default": ExternalOp(),
    "aten.split.Tensor": ExternalOp(views=(0,), multi=True),
    "aten.sum.default": ExternalOp(),
    "aten.t.default": ExternalOp(views=(0,)),
    "aten.tanh.default": ExternalOp(),
    "aten.view.default": ExternalOp(views=(0,)),
}
"""Effects by schema of each op that the strategy uses."""

SHAPES = ((3,), (4, 3), (3, 3), (5, 2), (1,), (2, 3), (7,), ())
DTYPES = (DType.f32, DType.bf16, DType.f64)
CPU = Token("device", "cpu")

Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def graphs(draw: Draw, max_params: int = 4, max_ops: int = 8) -> Graph:
    """A captured training step: some parameters have a stage or a master of their own, some are
    offloaded, some get no gradient."""
    sketch = _Sketch(draw)
    for _ in range(draw(st.integers(1, max_params))):
        sketch.param()
    for _ in range(draw(st.integers(1, 2))):
        sketch.input(InputKind.input)
    for kind in draw(st.lists(st.sampled_from((InputKind.buffer, InputKind.constant)), max_size=2)):
        sketch.input(kind)
    for _ in range(draw(st.integers(0, max_ops))):
        sketch.op(Phase.forward)
    sketch.forward_outputs()
    for _ in range(draw(st.integers(0, max_ops))):
        sketch.op(Phase.backward)
    sketch.gradients()
    return sketch.graph()


class _Sketch:
    """A graph in the making. `readable` holds what a node of the present phase may read."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.outputs: list[Output] = []
        self.readable: list[Value] = []
        self.count = 0

    def graph(self) -> Graph:
        used = {n.op for n in self.nodes}
        foreign = {op: row for op, row in FOREIGN.items() if op in used}
        return Graph("random", tuple(self.inputs), tuple(self.nodes), tuple(self.outputs), foreign=foreign)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def chance(self, percent: int) -> bool:
        return bool(self.draw(st.integers(0, 99)) >= 100 - percent)

    def pick(self, *wanted: Callable[[TensorType], bool]) -> Value | None:
        """A value to read, of a type that is `wanted`."""
        fitting = [v for v in self.readable if all(w(v.tensor) for w in wanted)]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    # --- inputs ------------------------------------------------------------------------------------------------

    def input(self, kind: InputKind, made: TensorType | None = None) -> Value:
        made = made or TensorType(self.draw(st.sampled_from(DTYPES)), self.draw(st.sampled_from(SHAPES)))
        value = Value(self.name(kind.value), made)
        target = f"model.{value.name}" if kind in (InputKind.buffer, InputKind.constant) else ""
        self.inputs.append(Input(kind, value, target))
        self.readable.append(value)
        return value

    def param(self) -> None:
        dtype = self.draw(st.sampled_from(DTYPES))
        value = Value(self.name("param"), TensorType(dtype, self.draw(st.sampled_from(SHAPES))))
        stage = self.draw(st.sampled_from((None, None, 0, 1, 2, 3)))
        master = DType.f32 if dtype is DType.bf16 and self.chance(50) else None
        offload = self.draw(st.sampled_from(["optimizer", "parameters"])) if self.chance(20) else ""
        self.inputs.append(Input(InputKind.param, value, f"model.{value.name}", stage, master, offload))
        self.readable.append(value)

    # --- nodes -------------------------------------------------------------------------------------------------

    def node(self, op: str, args: tuple[Arg, ...], *made: TensorType, phase: Phase, **kwargs: Arg) -> Value:
        results = tuple(Value(self.name("v"), kind) for kind in made)
        self.nodes.append(Node(op, args, results, tuple(sorted(kwargs.items())), phase))
        self.readable.extend(results)
        return results[0]

    def op(self, phase: Phase) -> None:
        """One random op on random operands."""
        kinds = (self.unary, self.binary, self.matmul, self.transpose, self.flatten, self.split, self.cast, self.fill)
        self.draw(st.sampled_from(kinds))(phase)

    def unary(self, phase: Phase) -> None:
        x = self.pick()
        assert x is not None
        ops = (
            "aten.tanh.default",
            "aten.neg.default",
            "aten.detach.default",
            "aten.alias.default",
            "aten.clone.default",
            "aten.bernoulli.p",
        )
        op = self.draw(st.sampled_from(ops))
        self.node(op, (x, 0.5) if op == "aten.bernoulli.p" else (x,), x.tensor, phase=phase)

    def binary(self, phase: Phase) -> None:
        x = self.pick()
        assert x is not None
        y = self.pick(lambda t: (t.dtype, t.shape) == (x.tensor.dtype, x.tensor.shape))
        op = self.draw(st.sampled_from(("aten.add.Tensor", "aten.mul.Tensor")))
        self.node(op, (x, y), x.tensor.contiguous(), phase=phase)

    def matmul(self, phase: Phase) -> None:
        if x := self.pick(_is_matrix):
            y = self.pick(_is_matrix, lambda t: t.dtype is x.tensor.dtype and t.shape[0] == x.tensor.shape[1])
            if y is not None:
                made = TensorType(x.tensor.dtype, (x.tensor.shape[0], y.tensor.shape[1]))
                self.node("aten.mm.default", (x, y), made, phase=phase)

    def transpose(self, phase: Phase) -> None:
        if x := self.pick(_is_matrix, lambda t: t.strides is None):
            rows, columns = x.tensor.shape
            made = TensorType(x.tensor.dtype, (columns, rows), (1, columns))
            self.node("aten.t.default", (x,), made, phase=phase)

    def flatten(self, phase: Phase) -> None:
        given = {i.value.name for i in self.inputs}  # these are dense whatever happens to them
        flat = [v for v in self.readable if v.name in given]
        x = self.draw(st.sampled_from(flat))
        made = TensorType(x.tensor.dtype, (x.tensor.numel,))
        self.node("aten.view.default", (x, (x.tensor.numel,)), made, phase=phase)

    def split(self, phase: Phase) -> None:
        if x := self.pick(_is_matrix, lambda t: t.strides is None):
            rows, columns = x.tensor.shape
            made = [TensorType(x.tensor.dtype, (min(2, rows - at), columns)) for at in range(0, rows, 2)]
            self.node("aten.split.Tensor", (x, 2), *made, phase=phase)

    def cast(self, phase: Phase) -> None:
        x = self.pick()
        assert x is not None
        self.to(x, self.draw(st.sampled_from(DTYPES)), phase)

    def to(self, x: Value, dtype: DType, phase: Phase) -> Value:
        if x.tensor.dtype is dtype:
            return x
        return self.node("aten._to_copy.default", (x,), x.tensor.contiguous(dtype), phase=phase, dtype=dtype)

    def fill(self, phase: Phase) -> None:
        """A value that no rank's data is in."""
        made = TensorType(self.draw(st.sampled_from(DTYPES)), self.draw(st.sampled_from(SHAPES)))
        self.node("aten.full.default", (made.shape, 0.5), made, phase=phase, dtype=made.dtype, device=CPU)

    # --- outputs -----------------------------------------------------------------------------------------------

    def forward_outputs(self) -> None:
        """One or two outputs with their tangents, and the new value of some buffers."""
        x = self.pick()
        assert x is not None
        self.node("aten.tanh.default", (x,), x.tensor.contiguous(), phase=Phase.forward)
        made = [r for n in self.nodes for r in n.results]
        for entry in [i for i in self.inputs if i.kind is InputKind.buffer]:
            fitting = [v for v in made if v.type == entry.value.type]
            if fitting and self.chance(75):
                self.outputs.append(Output(OutputKind.mutation, self.draw(st.sampled_from(fitting)), entry.value.name))
        for value in [made[-1], *self.draw(st.lists(st.sampled_from(made), max_size=1))]:
            self.outputs.append(Output(OutputKind.output, value))
            self.input(InputKind.tangent, value.tensor.contiguous())

    def gradients(self) -> None:
        """A gradient for most parameters and some inputs; others are frozen."""
        for entry in [i for i in self.inputs if i.kind in (InputKind.param, InputKind.input)]:
            wanted = self.chance(80 if entry.kind is InputKind.param else 20)
            value = self.gradient(entry.value) if wanted else None
            kind = OutputKind.output if value is None else OutputKind.grad
            self.outputs.append(Output(kind, value, entry.value.name if value else "", Phase.backward))

    def gradient(self, of: Value) -> Value:
        """A value that may be a gradient: any value of the type, or something made of the sum of a backward value."""
        kind, phase = of.tensor, Phase.backward
        if self.chance(25) and (found := self.pick(lambda t: t == kind)):
            return found
        known = {i.value.name for i in self.inputs if i.kind is not InputKind.tangent}
        known |= {r.name for n in self.nodes if n.phase is Phase.forward for r in n.results}
        x = self.draw(st.sampled_from([v for v in self.readable if v.name not in known]))
        total = self.node("aten.sum.default", (x,), TensorType(x.tensor.dtype, ()), phase=phase)
        total = self.to(total, kind.dtype, phase)
        if self.chance(50):
            return self.node("aten.expand.default", (total, kind.shape), _expanded(kind), phase=phase)
        y = self.pick(lambda t: (t.dtype, t.shape) == (kind.dtype, kind.shape))
        return self.node("aten.mul.Tensor", (y, total), kind, phase=phase)


def _is_matrix(kind: TensorType) -> bool:
    return len(kind.shape) == 2


def _expanded(kind: TensorType) -> TensorType:
    strides = (0,) * len(kind.shape)
    return TensorType(kind.dtype, kind.shape, strides if kind.numel != 1 else None)
