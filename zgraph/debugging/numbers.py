"""Random numbers for the inputs of a graph: what lives from step to step, and a batch for each micro-step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.debugging.ranges import Span, drawn_from, spans
from zgraph.interpreter import Ranks
from zgraph.ir import DType, Graph, Input, InputKind, ScalarType, TensorType
from zgraph.ir.symbols import Dim, evaluate

SIZE = 6
"""Value of a symbolic size without a hint."""

_BATCH = (InputKind.input, InputKind.tangent)
_APART = 1_000_003
"""Seeds of batches are this far apart."""


class Numbers:
    """Random numbers for the inputs of a graph on simulated ranks.

    Parameters, buffers and constants are the same on all ranks, inputs and tangents each rank's own.

    Args:
        graph: whose inputs they are.
        num_ranks: how many ranks are simulated.
        seed: of all of them.
        sizes: of symbols.

    Attributes:
        rest: what lives from step to step, by the value's name: tensors that are whole, and numbers.
    """

    def __init__(self, graph: Graph, num_ranks: int, seed: int, sizes: Mapping[str, int]) -> None:
        self.graph, self.num_ranks, self.seed, self.sizes = graph, num_ranks, seed, sizes
        symbols = {str(s) for dim in _dims(graph) for s in dim.free_symbols}
        self.spans = spans(graph, {name: sizes.get(name, SIZE) for name in symbols})
        self.random = torch.Generator().manual_seed(seed)
        self.rest = {i.value.name: self._at_rest(i) for i in graph.inputs if not self._is_own(i)}
        self._batches: dict[int, dict[str, Ranks]] = {}

    def batch(self, number: int) -> dict[str, Ranks]:
        """Inputs and tangents of each rank in a micro-step, by the value's name."""
        if number not in self._batches:
            self.random.manual_seed(self.seed + _APART * (number + 1))
            own = [i.value for i in self.graph.inputs if self._is_own(i)]
            self._batches[number] = {
                v.name: [
                    self._drawn(v.tensor, self.spans.get(v.name), number * self.num_ranks + rank)
                    for rank in range(self.num_ranks)
                ]
                for v in own
            }
        return self._batches[number]

    def size(self, dim: Dim) -> int:
        """A size as a number."""
        if isinstance(dim, int):
            return dim
        return evaluate(dim, {str(s): self.sizes.get(str(s), SIZE) for s in dim.free_symbols})

    def weight(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        """A parameter, of numbers with which layers keep the size of what they are given."""
        drawn = self.tensor(kind, dtype)
        if drawn.ndim < 2 or not drawn.numel() or not drawn.is_floating_point():
            return drawn
        size: float = (3 * len(drawn) / drawn.numel()) ** 0.5
        return (2 * drawn - 1) * size

    def tensor(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        """Numbers from 0 to 1, 0 or 1 where they are whole, in memory as the type says."""
        wanted, shape = TO_TORCH[dtype or kind.dtype], [self.size(d) for d in kind.shape]
        strides = None if kind.strides is None else [self.size(d) for d in kind.strides]
        count = math.prod(shape) if strides is None else reach(shape, strides)
        if wanted.is_floating_point or wanted.is_complex:
            drawn = torch.rand(count, generator=self.random, dtype=torch.float64).to(wanted)
        else:
            drawn = torch.randint(0, 2, (count,), generator=self.random).to(wanted)
        return drawn.view(shape) if strides is None else drawn.as_strided(shape, strides)

    def _is_own(self, entry: Input) -> bool:
        kind = entry.value.type
        if entry.kind not in _BATCH or not isinstance(kind, TensorType):
            return False
        return kind.varies or not kind.placement

    def _at_rest(self, entry: Input) -> Any:
        kind = entry.value.type
        if isinstance(kind, ScalarType):
            return SIZE if kind.expr is None else self.size(kind.expr)
        if not isinstance(kind, TensorType):
            return None
        if entry.kind is InputKind.param:
            return self.weight(kind, entry.master)
        return self._drawn(kind, self.spans.get(entry.value.name), 0)

    def _drawn(self, kind: TensorType, span: Span | None, turn: int) -> torch.Tensor:
        """A tensor; where it indexes something, of numbers of all that it may be, over turns if there is no room."""
        made = self.tensor(kind)
        if span is None or made.dtype == torch.bool or made.is_floating_point() or not made.numel():
            return made
        limits = torch.iinfo(made.dtype)
        numbers = drawn_from(span.within(limits.min, limits.max), made.numel(), turn, self.random)
        return made.copy_(numbers.view(made.shape))


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory a tensor of these sizes and strides reaches over."""
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of floating-point numbers in another dtype, which lies in memory as before; others as they are."""
    wide = {torch.float64: torch.complex128, torch.float32: torch.complex64}
    wanted = wide.get(dtype, tensor.dtype) if tensor.is_complex() else dtype
    if tensor.dtype == wanted or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    count = reach(tensor.shape, tensor.stride())
    flat = tensor.as_strided((count,), (1,)).to(wanted)
    return flat.as_strided(tensor.shape, tensor.stride(), 0)


def _dims(graph: Graph) -> list[Any]:
    """The sizes of a graph that are not known."""
    values = [*(i.value for i in graph.inputs), *(r for n in graph.nodes for r in n.results)]
    found: list[Dim] = []
    for value in values:
        if isinstance(value.type, TensorType):
            found += value.type.shape
        elif isinstance(value.type, ScalarType) and value.type.expr is not None:
            found.append(value.type.expr)
    return [dim for dim in found if not isinstance(dim, int)]
