"""A captured graph on simulated ranks, as the measure of what it is after passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zgraph.aten import TO_TORCH
from zgraph.interp import Interpreter, Ranks, mean, whole
from zgraph.ir import Axis, DType, Graph, Input, InputKind, Output, OutputKind, TensorType
from zgraph.ir.symbols import evaluate
from zgraph.passes import Context, Pass, Pipeline

SIZE = 6
"""What a symbolic size is taken to be."""


def context(num_ranks: int, reduce_dtype: DType | None = None, num_copies: int = 1) -> Context:
    """Ranks in a line, or in rows (as many as `num_copies`) that all hold the same shards."""
    rows = (Axis("replicate", num_copies),) if num_copies > 1 else ()
    return Context(mesh=(*rows, Axis("shard", num_ranks // num_copies)), reduce_dtype=reduce_dtype)


class Reference:
    """A captured graph, random inputs for it on `num_ranks` ranks, and what it gives on them.

    Parameters, buffers and constants are the same on all ranks, inputs and tangents each rank's own.
    """

    def __init__(self, captured: Graph, num_ranks: int, seed: int = 0) -> None:
        self.captured, self.num_ranks, self.seed = captured, num_ranks, seed
        self.random = torch.Generator().manual_seed(seed)
        self.values = {i.value.name: self.made(i) for i in captured.inputs}
        self.raw = self.run(captured)

    def next_batch(self) -> Reference:
        """The same with other inputs and tangents."""
        other = Reference(self.captured, self.num_ranks, self.seed + 1)
        same = {i.value.name for i in self.captured.inputs if i.kind not in (InputKind.input, InputKind.tangent)}
        other.values |= {name: value for name, value in self.values.items() if name in same}
        other.raw = other.run(self.captured)
        return other

    def made(self, entry: Input) -> Any:
        kind = entry.value.type
        if not isinstance(kind, TensorType):
            return SIZE
        if entry.kind in (InputKind.input, InputKind.tangent):
            return [self.tensor(kind) for _ in range(self.num_ranks)]
        return self.tensor(kind, entry.master)

    def tensor(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        symbols = {str(s) for d in kind.shape if not isinstance(d, int) for s in d.free_symbols}
        shape = [evaluate(d, dict.fromkeys(symbols, SIZE)) for d in kind.shape]
        wanted = TO_TORCH[dtype or kind.dtype]
        if not wanted.is_floating_point:
            return torch.randint(0, 2, shape, generator=self.random).to(wanted)
        return torch.rand(shape, generator=self.random, dtype=torch.float64).to(wanted)

    def run(self, graph: Graph, held: dict[str, Ranks] | None = None) -> list[Ranks | None]:
        """The outputs of some form of the captured graph, sharded ones put together again."""
        interpreter = Interpreter(self.num_ranks)
        interpreter.held.update(held or {})
        dtypes = {i.value.name: TO_TORCH[i.value.tensor.dtype] for i in graph.params}
        inputs = {name: v.to(dtypes[name]) if name in dtypes else v for name, v in self.values.items()}
        outputs = interpreter.run(graph, inputs)
        assert not interpreter.held
        return [None if r is None else whole(o, r) for o, r in zip(graph.outputs, outputs, strict=True)]

    def expected(self, after: Graph, reduce_dtype: DType | None) -> list[Ranks | None]:
        """What `after` must give: what the captured graph gave, gradients averaged and buffers the first rank's."""
        kinds = {i.value.name: i for i in after.inputs}
        found: list[Ranks | None] = []
        for output, ranks, made in zip(self.captured.outputs, self.raw, after.outputs, strict=True):
            target = kinds.get(output.target)
            if ranks is not None and after.mesh and target is not None:
                ranks = _over_ranks(output, ranks, target, reduce_dtype)
            if ranks is not None and output.kind is OutputKind.grad and target.kind is InputKind.param:
                ranks = [r.to(TO_TORCH[made.value.tensor.dtype]) for r in ranks]
            found.append(ranks)
        return found

    def check(self, pipeline: Pipeline, reduce_dtype: DType | None = None, num_copies: int = 1) -> None:
        """The graph after each pass gives the numbers of the captured one, to the last bit."""
        steps = Steps()
        pipeline.run(self.captured, context(self.num_ranks, reduce_dtype, num_copies), [steps])
        for name, graph in steps.graphs:
            wrong = differences(self.expected(graph, reduce_dtype), self.run(graph))
            assert not wrong, f"after {name}: " + "\n".join(wrong)


def _over_ranks(output: Output, ranks: Ranks, target: Input, reduce_dtype: DType | None) -> Ranks:
    if output.kind is OutputKind.mutation and target.kind is InputKind.buffer:
        return [ranks[0]] * len(ranks)
    if output.kind is OutputKind.grad and target.kind is InputKind.param:
        wanted = TO_TORCH[reduce_dtype] if reduce_dtype else ranks[0].dtype
        return [mean([r.to(wanted) for r in ranks])] * len(ranks)
    return ranks


def differences(wanted: Sequence[Ranks | None], got: Sequence[Ranks | None]) -> list[str]:
    """Where two lists of outputs are not the same to the last bit."""
    found = []
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if (a is None) != (b is None):
            found.append(f"output {index}: one is missing")
            continue
        for rank, (x, y) in enumerate(zip(a or (), b or (), strict=True)):
            if not same_bits(x, y):
                found.append(f"output {index}, rank {rank}: {x} is not {y}")
    return found


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    flat = [torch.cat([t.reshape(-1)]).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


class Steps:
    """An instrument that keeps the graph after each pass that changed it."""

    def __init__(self) -> None:
        self.graphs: list[tuple[str, Graph]] = []

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        if before != after:
            self.graphs.append((step.name, after))
