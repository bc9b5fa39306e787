"""Kernels by their specification: ops and the kernels that stand in their place, spelled out in the same scalar steps.

    aten.silu(x)                          mul(x, sigmoid(x))
    rows([x], "...; s = sigmoid(x0); y = mul(x0, s)")   mul(x, sigmoid(x))

What an op is in steps is said by `zgraph.passes.fusion.patterns`, a table whose rows are tested against torch; matching
and sizes are this module's own. A term is the sequence of a value's numbers, whatever shape it is seen in, so that
views that only change the shape are nothing; what reads a value says how it lies in the result. A cast from one
floating dtype to another is nothing, as kernels compute in fp32, but no value may be in a dtype of fewer bits that it
was not in before. Additions may be in any order. A dropout's draw is known by the dropout's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from zgraph.certify.steps import Number, Sized, Steps, keyed, lies, shape_of
from zgraph.certify.terms import ZERO, Meaning, Reader, constant
from zgraph.codegen.ops import SCALAR_OPS, Extent
from zgraph.codegen.spec import ACC, KernelSpec
from zgraph.errors import KernelError
from zgraph.ir import Arg, DType, Graph, Node, TensorType, Value
from zgraph.ir.external_ops import (
    COMPILED,
    DROPOUT,
    LOSS,
    LOSS_BACKWARD,
    MATMUL,
    PROJECTED_LOSS,
    PROJECTED_LOSS_BACKWARD,
    RECTIFIED,
    ROTARY,
    ROWS,
    SEED,
    facts,
)
from zgraph.ir.ops import views
from zgraph.ir.symbols import Dim
from zgraph.passes.fusion.patterns import PATTERNS, Pattern

ROW_KERNELS = frozenset({ROWS, COMPILED})
LOSSES = {
    LOSS: (False, False),
    LOSS_BACKWARD: (False, True),
    PROJECTED_LOSS: (True, False),
    PROJECTED_LOSS_BACKWARD: (True, True),
}
"""Whether the projection is part of it, and whether it is the backward."""

KERNELS = ROW_KERNELS | LOSSES.keys() | {MATMUL, ROTARY, RECTIFIED}

_FLOATS = frozenset({DType.f32, DType.bf16, DType.f16})
_WORDS = frozenset({"none", "true", "false", "last", "rows"})
END = 2**63 - 1


def kernels(graph: Graph) -> Counter[Hashable]:
    """How often each kernel stands in the place of other ops, whatever it reads."""
    return Counter((n.op, tuple(constant(a, repeat("%")) for a in n.args)) for n in graph.nodes if n.op in KERNELS)


def spelled(graph: Graph, terms: Steps, zeros: frozenset[str] = frozenset()) -> Meaning:
    """Meaning of a graph that is not yet placed, in scalar steps."""
    return Speller(graph, terms, zeros).run()


class Speller(Reader):
    """Walks a graph in order, and spells out what it can."""

    table: Steps

    def __init__(self, graph: Graph, terms: Steps, zeros: frozenset[str]) -> None:
        super().__init__(graph, terms, {}, zeros, unsynced=False)

    def foreign(self, node: Node, operands: list[int]) -> Sequence[int]:
        given = {v.name: Sized(t, shape_of(v)) for v, t in zip(node.operands, operands, strict=True)}
        made = self.kernel(node, given) if node.op in KERNELS else self.plain(node, given)
        if made is None:
            return [self.table.of("malformed", node.name, i) for i in range(len(node.results))]
        return made

    # --- ops -----------------------------------------------------------------------------------------------------

    def plain(self, node: Node, given: Mapping[str, Sized]) -> Sequence[int] | None:
        """An op of ATen: in steps if a pattern says what they are, else by its name."""
        first = next(iter(given.values()), None)
        if facts(node.op).elements in ("itself", "reshaped") and first is not None:
            return (first.term,)
        if node.op == "aten.expand.default" and first is not None:
            return (self.table.expand(first, shape_of(node.results[0])),)
        if node.op == SEED:
            return (self.table.of("seed", node.results[0].name.removesuffix("_seed")),)
        if node.op == "aten.addmm.default" and not node.kwargs:
            bias, a, b = (given[v.name] for v in node.operands)
            return (self.table.sum(bias, self.call("aten.mm.default", (a, b), shape_of(node.results[0]))).term,)
        if (found := self.patterned(node, given)) is not None:
            return found
        args = [self.argument(a, given) for a in node.args]
        kwargs = [(name, self.argument(a, given)) for name, a in node.kwargs]
        return self.called(node, args, kwargs, list(given.values()))

    def called(self, node: Node, args: list[Hashable], kwargs: list[Any], operands: Sequence[Sized]) -> Sequence[int]:
        """The terms of an op by its name."""
        if ZERO in (o.term for o in operands):
            zero = facts(node.op).zero
            if zero == "any" or (operands[0].term == ZERO and (zero == "first" or views(self.graph, node))):
                return [ZERO] * len(node.results)
        shape = shape_of(node.results[0]) if node.results else ()
        key = (node.op, *normal(node.op, args, operands, shape), *kwargs)
        if not self.graph.foreign[node.op].is_pure:
            self.state = self.table.of("state", self.state, key)
            key = (self.state, *key)
        if len(node.results) == 1:
            return (self.of(key),)
        return [self.table.of(i, key) for i in range(len(node.results))]

    def of(self, key: tuple[Hashable, ...]) -> int:
        """The term of a call; that of a transpose's transpose is what was transposed."""
        if key[0] == "aten.t.default" and isinstance(key[1], tuple):
            if (back := self.table.turned.get(key[1][1])) is not None:
                return back
            term = self.table.of(key)
            self.table.turned[term] = int(key[1][1])
            return term
        return self.table.of(key)

    def call(self, op: str, args: Sequence[Hashable | Sized], shape: tuple[Dim, ...]) -> Sized:
        """Result of an op that a kernel stands for."""
        operands = [a for a in args if isinstance(a, Sized)]
        if any(o.term == ZERO for o in operands) and (facts(op).zero == "any" or operands[0].term == ZERO):
            return Sized(ZERO, shape)
        key = (op, *normal(op, [keyed(a) if isinstance(a, Sized) else a for a in args], operands, shape))
        return Sized(self.of(key), shape)

    def argument(self, arg: Arg, given: Mapping[str, Sized]) -> Hashable:
        match arg:
            case Value():
                return keyed(given[arg.name])
            case tuple():
                return ("list", *(self.argument(a, given) for a in arg))
        return constant(arg, iter(()))

    def patterned(self, node: Node, given: Mapping[str, Sized]) -> Sequence[int] | None:
        """The terms of an op by a pattern; None if none fits."""
        kinds = [v.type for v in (*node.operands, *node.results)]
        dtypes = {k.dtype if isinstance(k, TensorType) else None for k in kinds}
        if not dtypes <= {*_FLOATS, DType.f64, DType.bool} or (DType.f64 in dtypes and facts(node.op).options_in_types):
            return None  # kernels do not compute in fp64: a cast to it or from it counts
        for pattern in PATTERNS.get(node.op, ()):
            bound = bind(pattern, node)
            if bound is None or len(pattern.results) != len(node.results):
                continue
            names: dict[str, Number] = {
                name: given[thing.name] if isinstance(thing, Value) else thing for name, thing in bound.items()
            }
            full = next(v for v in names.values() if isinstance(v, Sized))
            shape = shape_of(node.results[0]) if node.op != "aten.sum.dim_IntList" else full.shape
            if any(SCALAR_OPS[s.op].reduces for s in pattern.steps):
                sizes = [v for v in names.values() if isinstance(v, Sized)]
                if any(isinstance(lies(v, full), tuple) for v in sizes):
                    return None
                shape = full.shape
                names["per_column"] = 1 / full.last if isinstance(full.last, int) else 0.0
            if isinstance(p := names.get("p"), float) and p < 1:
                names["per_kept"] = 1 / (1 - p)
            if node.op == DROPOUT:
                names["seed"] = Sized(self.table.of("seed", node.name), ())
            self.table.run(pattern.steps, names, shape)
            return [self.table.term(names[name]) for name in pattern.results]
        return None

    # --- kernels -------------------------------------------------------------------------------------------------

    def kernel(self, node: Node, given: Mapping[str, Sized]) -> Sequence[int] | None:
        """Terms of a kernel's results; None if the kernel does not fit its operands."""
        operands = [given[v.name] for v in node.operands]
        try:
            if node.op in ROW_KERNELS:
                return self.rows(node, operands, KernelSpec.parse(str(node.args[1])), None)
            if node.op == MATMUL:
                a, b, *others = operands
                shape = (*a.shape[:-1], b.last)
                product = self.call("aten.mm.default" if len(a.shape) == 2 else "aten.bmm.default", (a, b), shape)
                return self.rows(node, others, KernelSpec.parse(str(node.args[3])), product)
        except KernelError:
            return None
        if node.op == RECTIFIED:
            if node.kwargs or len(node.args) != 3:
                return None
            bias, a, b = operands
            total = self.table.sum(bias, self.call("aten.mm.default", (a, b), shape_of(node.results[0])))
            return (self.table.pointwise("maximum", (total, 0.0), total.shape).term,)
        if node.op == ROTARY:
            x, cos, sin = operands
            return (self.rotary(x, cos, sin, back=bool(node.args[4])).term,)
        return self.loss(node, operands)

    def rows(
        self, node: Node, operands: Sequence[Sized], spec: KernelSpec, product: Sized | None
    ) -> Sequence[int] | None:
        inputs = [o for o in spec.inputs if o.name != ACC]
        kinds = [v.type for v in node.operands[len(node.operands) - len(operands) :]]
        whole = product or next((v for o, v in zip(inputs, operands, strict=True) if o.extent is Extent.full), None)
        if whole is None or len(inputs) != len(operands) or whole.last != spec.columns:
            return None
        names: dict[str, Number] = {} if product is None else {ACC: product}
        for operand, value, kind in zip(inputs, operands, kinds, strict=True):
            shape = operand.extent.shape(whole.shape[:-1], spec.columns)
            seen = Sized(value.term, shape)
            is_seed = operand.extent is Extent.scalar and isinstance(kind, TensorType) and kind.dtype is DType.i64
            if not is_seed and (not isinstance(kind, TensorType) or kind.dtype is not operand.dtype):
                return None
            if (seen.numel, seen.last) != (value.numel, value.last):
                return None
            names[operand.name] = seen
        self.table.run(spec.steps, names, whole.shape)
        return [self.table.term(names[o.name]) for o in spec.outputs]

    def rotary(self, x: Sized, cos: Sized, sin: Sized, *, back: bool) -> Sized:
        """Pairs of columns turned, in the forward or in the backward; the columns beyond them as they are."""
        turned, columns = cos.last, x.last
        assert isinstance(turned, int)
        assert isinstance(columns, int)
        if turned < columns:
            low, rest = self.cut(x, 0, turned), self.cut(x, turned, columns)
            made = self.rotary(low, cos, sin, back=back)
            if back:
                return self.table.sum(self.uncut(rest, x, turned, columns), self.uncut(made, x, 0, turned))
            return self.concat(made, rest, x)
        half = turned // 2
        kept = self.table.product(x, cos)
        if not back:
            low, high = self.cut(x, 0, half), self.cut(x, half, turned)
            swapped = self.concat(self.negative(high), low, x)
            return self.table.sum(kept, self.table.product(swapped, sin))
        scaled = self.table.product(x, sin)
        low, high = self.cut(scaled, 0, half), self.cut(scaled, half, turned)
        both = self.table.sum(self.uncut(self.negative(low), x, half, turned), self.uncut(high, x, 0, half))
        return self.table.sum(both, kept)

    def negative(self, x: Sized) -> Sized:
        return self.table.pointwise("neg", (x,), x.shape)

    def cut(self, x: Sized, start: int, end: int) -> Sized:
        args = (x, ("int", len(x.shape) - 1), ("int", start), ("int", end))
        return self.call("aten.slice.Tensor", args, (*x.shape[:-1], end - start))

    def uncut(self, x: Sized, whole: Sized, start: int, end: int) -> Sized:
        args = (x, "sizes", ("int", len(x.shape) - 1), ("int", start), ("int", end), ("int", 1))
        return self.call("aten.slice_backward.default", args, whole.shape)

    def concat(self, a: Sized, b: Sized, whole: Sized) -> Sized:
        key = ("aten.cat.default", ("list", keyed(a), keyed(b)), ("int", len(whole.shape) - 1))
        return Sized(self.table.of(key), whole.shape)

    def loss(self, node: Node, operands: Sequence[Sized]) -> Sequence[int] | None:
        """A cross-entropy as the ops that it stands for."""
        is_linear, is_backward = LOSSES[node.op]
        ignored, mean = node.args[-2:]
        tail = (("int", 1 if mean else 2), ("int", ignored))
        tangent, operands = (operands[0], operands[1:]) if is_backward else (None, operands)
        if is_linear:
            x, weight, target, *kept = operands
            flipped = self.call("aten.t.default", (weight,), weight.shape[::-1])
            logits = self.call("aten.mm.default", (x, flipped), (x.shape[0], weight.shape[0]))
        else:
            logits, target, *kept = operands
            flat = (target.numel, logits.last)
            logits = Sized(logits.term, flat)
        names: dict[str, Number] = {"x": logits}
        pattern = PATTERNS["aten._log_softmax.default"][0]
        self.table.run(pattern.steps, names, logits.shape)
        p = names[pattern.results[0]]
        assert isinstance(p, Sized)
        key = ("aten.nll_loss_forward.default", keyed(p), keyed(target), None, *tail)
        lse = self.table.of("lse", logits.term)
        if tangent is None:
            return [self.table.of(0, key), self.table.of(1, key), lse]
        number, has = kept
        if (number.term, has.term) != (self.table.of(1, key), lse):
            return None
        args = (tangent, p, target, None, *tail, number)
        behind = self.call("aten.nll_loss_backward.default", args, p.shape)
        pattern = PATTERNS["aten._log_softmax_backward_data.default"][0]
        names = {"g": behind, "y0": p}
        self.table.run(pattern.steps, names, p.shape)
        gradient = names[pattern.results[0]]
        assert isinstance(gradient, Sized)
        if not is_linear:
            return (gradient.term,)
        turned = self.call("aten.t.default", (gradient,), gradient.shape[::-1])
        return (
            self.call("aten.mm.default", (gradient, weight), x.shape).term,
            self.call("aten.mm.default", (turned, x), weight.shape).term,
        )


def bind(pattern: Pattern, node: Node) -> dict[str, Value | float] | None:
    """Values that the names of a pattern stand for; None if the node does not match it."""
    if not facts(node.op).options_in_types and {n: _word(a) for n, a in node.kwargs} != dict(pattern.keywords):
        return None
    if len(node.args) > len(pattern.args):
        return None
    rank = next((len(v.type.shape) for v in node.operands if isinstance(v.type, TensorType)), 0)
    bound: dict[str, Value | float] = {}
    for position, wanted in enumerate(pattern.args):
        arg = node.args[position] if position < len(node.args) else None
        if wanted == "_":
            continue
        if wanted in ("last", "rows"):
            dims = sorted(d % rank for d in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(d, int))
            if dims != ([rank - 1] if wanted == "last" else list(range(rank - 1))):
                return None
        elif wanted.isidentifier() and wanted not in _WORDS:
            if isinstance(arg, bool) or not isinstance(arg, Value | int | float):
                return None
            bound[wanted] = arg if isinstance(arg, Value) else float(arg)
        elif wanted != _word(arg):
            return None
    return bound


def _word(arg: Arg) -> str:
    if isinstance(arg, tuple):
        return "[" + ",".join(map(_word, arg)) + "]"
    is_number = isinstance(arg, int | float) and not isinstance(arg, bool)
    return f"{arg:g}" if is_number else str(arg).lower()


def normal(op: str, args: list[Hashable], operands: Sequence[Sized], shape: tuple[Dim, ...]) -> list[Hashable]:
    """Arguments that mean the same as the same: dims counted from the front, ends within the size."""
    rank = len(operands[0].shape) if operands else 0

    def number(at: int, default: int) -> int:
        found = args[at] if at < len(args) else None
        return found[1] if isinstance(found, tuple) and found[0] == "int" else default

    if op == "aten.cat.default":
        return [args[0], ("int", number(1, 0) % rank)]
    first = {"aten.slice.Tensor": 1, "aten.slice_backward.default": 2}.get(op)
    if first is None or not rank:
        return args
    dim = number(first, 0) % rank
    is_back = op == "aten.slice_backward.default"
    if is_back:
        args = [args[0], str(shape), *args[2:]]
    size = (shape if is_back else operands[0].shape)[dim]
    end = number(first + 2, END)
    ends = min(end, size) if isinstance(size, int) else end
    return [*args[:first], dim, number(first + 1, 0), ends, number(first + 3, 1)]


def rounded(graph: Graph, found: Meaning) -> Iterator[tuple[int, int, DType]]:
    """The values of fewer bits than fp32: the node that makes each, its term, and its dtype."""
    for position, node in enumerate(graph.nodes):
        for result in node.results:
            kind = result.type
            if isinstance(kind, TensorType) and kind.dtype in _FLOATS and kind.dtype is not DType.f32:
                yield position, found.terms[result.name], kind.dtype
