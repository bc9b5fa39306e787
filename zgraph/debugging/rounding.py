"""A check in the dtypes that the graph says: whether a graph rounds as the captured one does, and not worse.

No constant says how much worse is a mistake. The captured graph runs in fp64, and in its own dtypes: as it is, and a
few times with what each op reads changed in the last bit, at random. How far these runs are from fp64 is what rounding
makes of an output; another graph may be a few times as far. What rounds no worse than the graph itself is not
seen. Where gradients are large enough, f16 keeps as much of them as bf16 does; so a step runs with small ones, too.

Changing operands at random to see what rounding does: Parker, "Monte Carlo arithmetic", 1997.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

import torch

from zgraph.bridge.aten import FROM_TORCH
from zgraph.debugging.known import Reference
from zgraph.debugging.numbers import Numbers
from zgraph.debugging.outcome import Difference, compared, differences
from zgraph.debugging.programs import Course, Programs, rounded
from zgraph.debugging.training import Outputs, Rates, Training
from zgraph.ir import DType, Graph

NUM_DRAWS = 4
"""How often the captured graph runs with operands changed at random."""

MULTIPLE = 4.0
"""How many times further from fp64 an output may be than the furthest of those runs."""

NUM_CHANGES = 1 << 16
"""How many random changes are drawn, to be taken from different places again and again."""

_FLOOR = 1e-60


class Disturb:
    """Changes the last bit of numbers: up, down or not at all."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.changes = torch.randint(-1, 2, (NUM_CHANGES,), generator=self.random).double()
        self.factors: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers changed; where that is beyond the dtype, as they are.

        So are those in float8: what they are cast from is changed, and a last bit is an eighth of a number there.
        """
        if not tensor.numel() or tensor.dtype.itemsize == 1:
            return tensor
        made = tensor * self.drawn(tensor.numel(), tensor.dtype).view(tensor.shape)
        return made if math.isfinite(made.sum()) else torch.where(made.isfinite(), made, tensor)

    def drawn(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """As many factors, from some place on."""
        if dtype not in self.factors:
            self.factors[dtype] = (1 + torch.finfo(dtype).eps * self.changes).to(dtype)
        begin = int(torch.randint(NUM_CHANGES, (), generator=self.random))
        factors = self.factors[dtype]
        if begin + count > NUM_CHANGES:
            factors = factors.repeat(-(-(begin + count) // NUM_CHANGES))
        return factors[begin : begin + count]


class Rounding:
    """A graph, random inputs for it on ranks, and how far rounding takes what it gives from what it means.

    Args:
        captured: the graph.
        num_ranks: how many are simulated, where it is for no mesh.
        seed: of the inputs, and of what is changed at random.
        sizes: of symbols.
        reduce_dtype: the dtype in which gradients are averaged; None takes their own.
    """

    def __init__(
        self,
        captured: Graph,
        num_ranks: int,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        reduce_dtype: DType | None = None,
    ) -> None:
        self.captured, self.reduce_dtype = captured, reduce_dtype
        count = captured.num_ranks if captured.mesh else num_ranks
        numbers = Numbers(captured, count, seed, sizes or {})
        self.exact = Reference(captured, count, dtype=DType.f64, numbers=numbers, draws_in_own=True)
        self.rounding = [
            Reference(captured, count, numbers=numbers, disturb=disturb)
            for disturb in (None, *(Disturb(seed + number) for number in range(NUM_DRAWS)))
        ]

    def courses(self, courses: Iterator[Course]) -> Iterator[Course]:
        """First steps, and one with small gradients."""
        return rounded(courses)

    def training(self, candidate: Graph, programs: Programs, own: Collection[int]) -> Training:
        """A training with the programs of a graph, in its own dtypes."""
        return self.rounding[0].training(candidate, programs, own)

    def rates(self, course: Course, at: int) -> Rates:
        """How parameters are updated after a micro-step that syncs."""
        return self.exact.rates(course, at)

    def differing(
        self, course: Course, at: int, after: Programs, found: Outputs, tolerance: float | None, own: Collection[int]
    ) -> Iterator[Difference]:
        """The outputs of a micro-step that are further from fp64 than rounding takes them, in order."""
        exact = self.exact.wanted(course, at, after, own=own)
        runs = [r.wanted(course, at, after, self.reduce_dtype, own) for r in self.rounding]
        multiple = MULTIPLE if tolerance is None else tolerance
        for index, (wanted, got) in enumerate(zip(exact, found, strict=True)):
            allowed = multiple * max(self._unit(index), *(_furthest(wanted, run[index]) for run in runs))
            each = differences(self.captured, index, wanted, got, _FLOOR)
            worst = max(each, key=lambda d: d.error, default=None)
            if worst is not None and worst.error > allowed:
                text = f"{worst.text}; rounding takes it no further than {allowed / multiple:.2g}"
                yield Difference(index, worst.what, worst.rank, worst.error, text)

    def _unit(self, index: int) -> float:
        """The last bit of an output, of its largest number."""
        ranks = self.exact.raw[index]
        kind = self.captured.outputs[index].value
        if ranks is None or kind is None or not isinstance(ranks[0], torch.Tensor):
            return 0.0
        dtype = kind.tensor.dtype
        return torch.finfo(_TORCH[dtype]).eps if dtype in _TORCH else 0.0


_TORCH = {ours: theirs for theirs, ours in FROM_TORCH.items() if theirs.is_floating_point}


def _furthest(wanted: object, got: object) -> float:
    """How far an output is from fp64 on the rank where it is furthest."""
    if not isinstance(wanted, list) or not isinstance(got, list):
        return 0.0
    return max((compared(a, b, _FLOOR)[0] for a, b in zip(wanted, got, strict=True)), default=0.0)
