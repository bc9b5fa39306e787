"""Whether a graph does what the graph that it was made of does, on simulated ranks with random inputs.

Numbers are of one dtype, fp64 where nothing else is wanted, whatever the graph says: rounding is far below the
tolerance then, and what is above it is a mistake. Mistakes of rounding alone cannot be seen so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from zgraph.aten import TO_TORCH
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.debugging.ranges import bounds, drawn
from zgraph.errors import BudgetError, CheckError, VerifyError
from zgraph.interp import Interpreter, Ranks, mean, whole
from zgraph.ir import OPS, Arg, DType, Graph, Input, InputKind, Node, Output, OutputKind, ScalarType, TensorType, verify
from zgraph.ir.graph import Value
from zgraph.ir.layout import chunk_numel
from zgraph.ir.symbols import Dim, evaluate
from zgraph.ir.types import Type
from zgraph.passes.analysis.memory import Memory
from zgraph.passes.pipeline import print_size
from zgraph.runtime.host import available_bytes

SIZE = 6
"""What a symbolic size without a hint is taken to be."""

TOLERANCES: Mapping[DType, tuple[float, float]] = {DType.f64: (1e-8, 1e-6), DType.f32: (1e-3, 1e-3)}
"""By the dtype of a check: how much of its largest number an output may differ, and what counts as that number where
it is smaller (gradients that cancel out are nothing but rounding)."""

_WIDE: Mapping[DType, DType] = {DType.f32: DType.c64, DType.f64: DType.c128}
_FLOATS = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16})
_COMPLEX = frozenset(_WIDE.values())
_KERNEL_OPERAND = re.compile(rf"\b(?:{'|'.join(d.value for d in _FLOATS)})\[")
_DETAILS = re.compile(r"%[\w.]+|\d+|'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Difference:
    """An output that is not what it must be.

    Args:
        output: its position among the outputs.
        what: the output in words.
        rank: the rank that has it so.
        error: the largest difference, of the output's largest number.
        text: the place of that difference and both numbers, or what else is wrong.
    """

    output: int
    what: str
    rank: int
    error: float
    text: str

    def __str__(self) -> str:
        return f"{self.what} differs on rank {self.rank} by {self.error:.2g} of its largest number: {self.text}"


@dataclass(frozen=True)
class Failure:
    """How a graph is wrong.

    Args:
        kind: it breaks a rule of the IR, a pass or an op raised an error, or its numbers differ.
        signature: the same for two failures of one cause, as far as that can be told.
        message: what is wrong, in words.
        difference: of numbers that differ, the largest.
    """

    kind: Literal["invalid", "raises", "differs"]
    signature: str
    message: str
    difference: Difference | None = None

    @classmethod
    def raised(cls, error: Exception, where: str = "") -> Failure:
        """The failure of an error: its type, and the kind of message it has."""
        message = f"{type(error).__name__}: {error}"
        kind = _DETAILS.sub("_", message.splitlines()[0])
        return cls("invalid" if isinstance(error, VerifyError) else "raises", f"{where} {kind}", message)

    def is_like(self, other: Failure) -> bool:
        """Whether both are of one cause, as far as can be told."""
        return (self.kind, self.signature) == (other.kind, other.signature)


class Reference:
    """A graph, random inputs for it on `num_ranks` ranks, and what it gives on them.

    Parameters, buffers and constants are the same on all ranks, inputs and tangents each rank's own.

    Args:
        captured: the graph; one for a mesh has as many ranks as that.
        num_ranks: how many are simulated.
        seed: of the inputs.
        sizes: of symbols.
        dtype: what all floating-point numbers are; None leaves each what the graph says.
    """

    def __init__(
        self, captured: Graph, num_ranks: int, seed: int = 0, sizes: Mapping[str, int] | None = None,
        dtype: DType | None = None,
    ) -> None:  # fmt: skip
        self.captured, self.seed, self.sizes, self.dtype = captured, seed, sizes or {}, dtype
        self.num_ranks = captured.num_ranks if captured.mesh else num_ranks
        self.random = torch.Generator().manual_seed(seed)
        self.bounds = bounds(captured)
        self.values = {i.value.name: self.made(i) for i in self.as_run(captured).inputs}
        self.raw = self.run(captured)

    def as_run(self, graph: Graph) -> Graph:
        """The graph with numbers of the dtype that is checked in."""
        return graph if self.dtype is None else in_dtype(graph, self.dtype)

    def made(self, entry: Input) -> Any:
        kind = entry.value.type
        if isinstance(kind, ScalarType):
            return SIZE if kind.expr is None else self.size(kind.expr)
        if not isinstance(kind, TensorType):
            return None
        if entry.kind in (InputKind.input, InputKind.tangent) and (kind.varies or not kind.placement):
            sizes = [self.size(dim) for dim in self.bounds.get(entry.value.name, ())]
            below = min(sizes, default=0)
            return [self.indices(kind, below, r) if below else self.tensor(kind) for r in range(self.num_ranks)]
        draw = self.weight if entry.kind is InputKind.param else self.tensor
        return draw(kind, entry.master)

    def size(self, dim: Dim) -> int:
        """A size as a number."""
        if isinstance(dim, int):
            return dim
        return evaluate(dim, {str(s): self.sizes.get(str(s), SIZE) for s in dim.free_symbols})

    def indices(self, kind: TensorType, bound: int, rank: int) -> torch.Tensor:
        """Whole numbers below a bound: over the ranks, as many different ones as there is room for."""
        made = self.tensor(kind)
        if made.dtype == torch.bool or made.is_floating_point():
            return made
        return made.copy_(drawn(made.numel(), bound, rank, self.random).view(made.shape))

    def tensor(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        """Numbers from 0 to 1, 0 or 1 where they are whole, in memory as the type says."""
        shape = [self.size(d) for d in kind.shape]
        strides = None if kind.strides is None else [self.size(d) for d in kind.strides]
        wanted = TO_TORCH[dtype or kind.dtype]
        count = math.prod(shape) if strides is None else _span(shape, strides)
        if wanted.is_floating_point or wanted.is_complex:
            drawn = torch.rand(count, generator=self.random, dtype=torch.float64).to(wanted)
        else:
            drawn = torch.randint(0, 2, (count,), generator=self.random).to(wanted)
        return drawn.view(shape) if strides is None else drawn.as_strided(shape, strides)

    def weight(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        """A parameter, of numbers with which layers keep the size of what they are given."""
        drawn = self.tensor(kind, dtype)
        return (
            drawn if drawn.ndim < 2 or not drawn.numel() else (2 * drawn - 1) * (3 * len(drawn) / drawn.numel()) ** 0.5
        )

    def run(self, graph: Graph, held: dict[str, Ranks] | None = None) -> list[Ranks | None]:
        """The outputs of some form of the captured graph, sharded ones put together again."""
        graph = self.as_run(graph)
        interpreter = Interpreter(self.num_ranks)
        interpreter.held.update(held or {})
        dtypes = {i.value.name: TO_TORCH[i.value.tensor.dtype] for i in graph.params}
        inputs = {name: v.to(dtypes[name]) if name in dtypes else v for name, v in self.values.items()}
        outputs = interpreter.run(graph, inputs)
        assert not interpreter.held
        return [None if r is None else whole(o, r) for o, r in zip(graph.outputs, outputs, strict=True)]

    def expected(
        self, after: Graph, reduce_dtype: DType | None = None, own: Collection[int] = ()
    ) -> list[Ranks | None]:
        """What `after` must give: what the captured graph gave, gradients averaged and buffers the first rank's.

        Args:
            after: what a pass has made of the captured graph.
            reduce_dtype: the dtype in which gradients are averaged; None takes their own.
            own: positions of outputs that each rank still has its own of.
        """
        kinds = {i.value.name: i for i in after.inputs}
        is_placed = bool(after.mesh) and not self.captured.mesh
        found: list[Ranks | None] = []
        for index, (output, ranks, made) in enumerate(zip(self.captured.outputs, self.raw, after.outputs, strict=True)):
            target = kinds.get(output.target)
            if ranks is not None and is_placed and target is not None and index not in own:
                ranks = _over_ranks(output, ranks, target, self.dtype or reduce_dtype)
            if ranks is not None and made.value is not None and target is not None:
                if output.kind is OutputKind.grad and target.kind is InputKind.param:
                    ranks = [r.to(TO_TORCH[self.dtype or made.value.tensor.dtype]) for r in ranks]
            found.append(ranks)
        return found


def reference(
    captured: Graph, num_ranks: int = 1, seed: int = 0, sizes: Mapping[str, int] | None = None,
    dtype: DType = DType.f64, max_bytes: int | None = None,
) -> Reference:  # fmt: skip
    """A graph with what it gives, for others to be compared with.

    Args:
        captured: the graph that is right.
        num_ranks: how many ranks are simulated, where the graph is for no mesh.
        seed: of the random inputs.
        sizes: a number for each symbolic size.
        dtype: f64 or f32, which all floating-point numbers are taken to be.
        max_bytes: memory to use at most; by default half of what is free.

    Raises:
        BudgetError: it would take more memory.
        CheckError: the graph cannot be run here, or gives no numbers.
        VerifyError: the graph is not valid.
    """
    verify(captured)
    check_memory(captured, num_ranks, sizes or {}, dtype, max_bytes)
    try:
        found = Reference(captured, num_ranks, seed, sizes, dtype)
    except Exception as error:
        raise CheckError(
            f"the graph to compare with cannot be run here: {type(error).__name__}: {error}. Trace the model on a "
            "processor, or reduce with a command that runs it: zgraph reduce --check"
        ) from error
    floats = [r for ranks in found.raw for r in ranks or () if isinstance(r, torch.Tensor) and r.is_floating_point()]
    if floats and not any(bool(r.isfinite().any()) for r in floats):
        raise CheckError("the graph to compare with gives no finite number for these inputs; take another --seed")
    return found


def examine(
    known: Reference, candidate: Graph, *, tolerance: float | None = None, own: Collection[int] | None = None
) -> Failure | None:
    """How a graph fails to do what another does; None where it does.

    Args:
        known: what it is compared with.
        candidate: the graph.
        tolerance: how much of its largest number an output may differ; by default what `TOLERANCES` says.
        own: of a graph in which a part of what places it on ranks is done, the positions of outputs that are not
            averaged over the ranks yet; None for any other graph. Outputs of such a one may lie in other places than
            what they belong to.
    """
    try:
        verify(candidate if own is None else _returning(candidate))
        found = differs(known, candidate, tolerance=tolerance, own=own or ())
    except Exception as error:  # whatever an op says of operands that do not fit
        return Failure.raised(error)
    return None if found is None else Failure("differs", "", str(found), found)


def _returning(graph: Graph) -> Graph:
    """The graph with what it returns belonging to no input."""
    return replace(graph, outputs=tuple(replace(o, kind=OutputKind.output, target="") for o in graph.outputs))


def differs(
    known: Reference, candidate: Graph, *, tolerance: float | None = None, own: Collection[int] = ()
) -> Difference | None:
    """The output of a graph that differs most from what another gives; None where all are within the tolerance.

    Args:
        known: what it is compared with.
        candidate: a valid graph.
        tolerance: how much of its largest number an output may differ; by default what `TOLERANCES` says.
        own: positions of outputs that are not averaged over the ranks yet.

    Raises:
        Exception: whatever an op raises whose operands do not fit.
    """
    if len(candidate.outputs) != len(known.captured.outputs):
        text = f"there are {len(candidate.outputs)} outputs, not {len(known.captured.outputs)}"
        return Difference(0, "the list of outputs", 0, math.inf, text)
    usual, floor = TOLERANCES[known.dtype or DType.f32]
    pairs = zip(known.expected(candidate, own=own), known.run(candidate), strict=True)
    found = [d for index, (a, b) in enumerate(pairs) for d in _differences(known.captured, index, a, b, floor)]
    worst = max(found, key=lambda d: d.error, default=None)
    return worst if worst is not None and worst.error > (usual if tolerance is None else tolerance) else None


def in_dtype(graph: Graph, dtype: DType) -> Graph:
    """The graph with all its floating-point numbers of one dtype: to be run, not always valid.

    Buckets are laid out anew, since members are aligned to bytes.
    """
    made: dict[str, Type] = {}

    def of_dtype(old: DType) -> DType:
        return dtype if old in _FLOATS else _WIDE[dtype] if old in _COMPLEX else old

    def of_type(kind: Type) -> Type:
        return replace(kind, dtype=of_dtype(kind.dtype)) if isinstance(kind, TensorType) else kind

    def of_arg(arg: Arg) -> Arg:
        match arg:
            case Value():
                return of_value(arg)
            case DType():
                return of_dtype(arg)
            case str():
                return _KERNEL_OPERAND.sub(f"{dtype.value}[", arg)
            case tuple():
                return tuple(map(of_arg, arg))
        return arg

    def of_node(node: Node) -> Node:
        kwargs = tuple((k, of_arg(a)) for k, a in node.kwargs)
        node = replace(
            node, args=tuple(map(of_arg, node.args)), kwargs=kwargs, results=tuple(map(of_value, node.results))
        )
        if node.op in OPS:
            made.update(zip((r.name for r in node.results), OPS[node.op].rule(node, graph.mesh), strict=True))
            node = replace(node, results=tuple(map(of_value, node.results)))
        return node

    def of_value(value: Value) -> Value:
        return Value(value.name, made.get(value.name) or of_type(value.type))

    return replace(
        graph,
        inputs=tuple(replace(i, value=of_value(i.value), master=None) for i in graph.inputs),
        nodes=tuple(map(of_node, graph.nodes)),
        outputs=tuple(replace(o, value=None if o.value is None else of_value(o.value)) for o in graph.outputs),
    )


def peak_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """The most bytes that one simulated rank has alive at once, counting nothing that an op takes for itself."""
    memory, births = Memory(graph), dict[str, int]()
    for value in (*(i.value for i in graph.inputs), *(r for n in graph.nodes for r in n.results)):
        if value.name in memory.roots(value.name):
            births[value.name] = _num_bytes(value.type, graph, sizes)
    last, kept = memory.last_uses(), memory.returned() | {i.value.name for i in graph.inputs}
    deaths: dict[int, list[str]] = {}
    for name in births:
        if name not in kept:
            deaths.setdefault(last[name], []).append(name)
    alive = most = sum(births[i.value.name] for i in graph.inputs)
    for position, node in enumerate(graph.nodes):
        alive += sum(births.get(r.name, 0) for r in node.results)
        most = max(most, alive)
        alive -= sum(births[name] for name in deaths.get(position, ()))
    return most


def check_memory(graph: Graph, num_ranks: int, sizes: Mapping[str, int], dtype: DType, max_bytes: int | None) -> None:
    """Raises BudgetError if checking a graph takes more memory than it may: half of what is free by default."""
    count = graph.num_ranks if graph.mesh else num_ranks
    needed = 2 * count * peak_bytes(in_dtype(graph, dtype), sizes)  # inputs twice, and what is compared with
    room = available_bytes() // 2 if max_bytes is None else max_bytes
    if needed > room:
        raise BudgetError(
            f"checking on {count} simulated ranks takes about {print_size(-(-needed // 2**20) * 2**20)} of memory, and "
            f"{print_size(room // 2**20 * 2**20)} may be used. Trace fewer layers, a smaller --batch or --seq; check "
            "on fewer ranks with --world; or allow more with --max-memory"
        )


def _num_bytes(kind: Type, graph: Graph, sizes: Mapping[str, int]) -> int:
    if not isinstance(kind, TensorType):
        return 0
    if kind.is_sharded:
        return chunk_numel(kind.shape, graph.num_shards) * kind.dtype.itemsize
    symbols = {str(s) for d in kind.shape if not isinstance(d, int) for s in d.free_symbols}
    return evaluate(kind.numel, {s: sizes.get(s, SIZE) for s in symbols}) * kind.dtype.itemsize


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory a tensor of these sizes and strides reaches over."""
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _over_ranks(output: Output, ranks: Ranks, target: Input, reduce_dtype: DType | None) -> Ranks:
    if output.kind is OutputKind.mutation and target.kind is InputKind.buffer:
        return [ranks[0]] * len(ranks)
    if output.kind is OutputKind.grad and target.kind is InputKind.param:
        wanted = TO_TORCH[reduce_dtype] if reduce_dtype else ranks[0].dtype
        return [mean([r.to(wanted) for r in ranks])] * len(ranks)
    return ranks


def _differences(graph: Graph, index: int, wanted: Ranks | None, got: Ranks | None, floor: float) -> list[Difference]:
    """What differs in an output, rank by rank, rounding included."""
    what = _described(graph, index)
    if wanted is None or got is None:
        same = wanted is got
        return [] if same else [Difference(index, what, 0, math.inf, "it is missing, or there is one too many")]
    found = []
    for rank, (a, b) in enumerate(zip(wanted, got, strict=True)):
        error, text = _compared(a, b, floor)
        if error:
            found.append(Difference(index, what, rank, error, text))
    return found


def _described(graph: Graph, index: int) -> str:
    output = graph.outputs[index]
    target = next((i.target for i in graph.inputs if i.value.name == output.target), "") or output.target
    words = {OutputKind.grad: "the gradient", OutputKind.mutation: "the new value", OutputKind.output: "output"}
    return f"{words[output.kind]} of {target}" if target else f"{words[output.kind]} {index}"


def _compared(wanted: Any, got: Any, floor: float) -> tuple[float, str]:
    """The error and its place. Both may have the same infinities, and be no numbers at the same places."""
    if not isinstance(wanted, torch.Tensor) or not isinstance(got, torch.Tensor):
        return (0.0, "") if wanted == got else (math.inf, f"it is {got}, not {wanted}")
    if wanted.shape != got.shape:
        return math.inf, f"its shape is {tuple(got.shape)}, not {tuple(wanted.shape)}"
    wide = torch.complex128 if wanted.is_complex() or got.is_complex() else torch.float64
    a, b = wanted.to(wide).reshape(-1), got.to(wide).reshape(-1)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0, ""
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
    finite = a.abs()[a.isfinite()]
    largest = max(float(finite.max()) if finite.numel() else 0.0, floor)
    if not wanted.is_floating_point() and not wanted.is_complex():
        largest = min(largest, 1.0)  # whole numbers are equal or wrong
    at = int(apart.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), wanted.shape)]
    return float(apart[at]) / largest, f"at {place} it is {_number(b[at])}, not {_number(a[at])}"


def _number(value: torch.Tensor) -> str:
    found = value.item()
    return f"{found:.6g}"
