"""A captured graph on simulated ranks, as the measure of what it is after passes: the same to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zgraph.debugging import known
from zgraph.debugging.numbers import Numbers
from zgraph.interpreter import Ranks
from zgraph.ir import Axis, DType, Graph, TensorType
from zgraph.passes import Context, Pass, Pipeline


def context(num_ranks: int, reduce_dtype: DType | None = None, num_copies: int = 1) -> Context:
    """Ranks in a line, or in rows (as many as `num_copies`) that all hold the same shards."""
    rows = (Axis("replicate", num_copies),) if num_copies > 1 else ()
    return Context(mesh=(*rows, Axis("shard", num_ranks // num_copies)), reduce_dtype=reduce_dtype)


class Positive(Numbers):
    """Parameters are as all numbers are: from 0 to 1."""

    def weight(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        return self.tensor(kind, dtype)


class Reference(known.Reference):
    """A captured graph with what it gives on ranks, with every number of the dtype that the graph says."""

    def __init__(self, captured: Graph, num_ranks: int) -> None:
        super().__init__(captured, num_ranks, numbers=Positive(captured, num_ranks, 0, {}))

    def check(self, pipeline: Pipeline, reduce_dtype: DType | None = None, num_copies: int = 1) -> None:
        """The graph after each pass gives the numbers of the captured one, to the last bit."""
        steps = Steps()
        pipeline.run(self.captured, context(self.num_ranks, reduce_dtype, num_copies), [steps])
        for name, graph in steps.graphs:
            wrong = differences(self.expected(graph, reduce_dtype=reduce_dtype), self.run(graph))
            assert not wrong, f"after {name}: " + "\n".join(wrong)


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
