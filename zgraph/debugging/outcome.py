"""Findings of a check: an output that differs, or another way in which a graph is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zgraph.errors import VerifyError
from zgraph.interpreter import Ranks
from zgraph.ir import Graph, OutputKind

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
        kind: it breaks a rule of the IR, a pass or an op raised an error, its numbers differ, or it does at another
            time what must wait.
        signature: the same for two failures of one cause, as far as that can be told.
        message: what is wrong, in words.
        difference: of numbers that differ, the first output that does.
        program: in which of the programs (`zgraph.debugging.programs`); empty where none ran.
    """

    kind: Literal["invalid", "raises", "differs", "misplaced"]
    signature: str
    message: str
    difference: Difference | None = None
    program: str = ""

    @classmethod
    def raised(cls, error: Exception, where: str = "", program: str = "") -> Failure:
        """The failure of an error: its type, and the kind of message it has."""
        message = f"{type(error).__name__}: {error}"
        kind = _DETAILS.sub("_", message.splitlines()[0])
        invalid = isinstance(error, VerifyError)
        return cls("invalid" if invalid else "raises", f"{where} {kind}", message, program=program)

    def is_like(self, other: Failure) -> bool:
        """Whether both are of one cause, as far as can be told."""
        mine, theirs = ((f.kind, f.signature, f.program) for f in (self, other))
        return mine == theirs


def differences(
    graph: Graph, index: int, wanted: Ranks | None, got: Ranks | None, floor: float
) -> Iterator[Difference]:
    """Differences in an output, rank by rank, rounding included.

    Args:
        graph: that has the output.
        index: which it is.
        wanted: what it must be on each rank.
        got: what it is.
        floor: what counts as the output's largest number where that is smaller.
    """
    what = described(graph, index)
    if wanted is None or got is None:
        if wanted is not got:
            yield Difference(index, what, 0, math.inf, "it is missing, or there is one too many")
        return
    for rank, (a, b) in enumerate(zip(wanted, got, strict=True)):
        error, text = compared(a, b, floor)
        if error:
            yield Difference(index, what, rank, error, text)


def described(graph: Graph, index: int) -> str:
    """An output in words."""
    output = graph.outputs[index]
    target = next((i.target for i in graph.inputs if i.value.name == output.target), "") or output.target
    words = {OutputKind.grad: "the gradient", OutputKind.mutation: "the new value", OutputKind.output: "output"}
    return f"{words[output.kind]} of {target}" if target else f"{words[output.kind]} {index}"


def compared(wanted: Any, got: Any, floor: float) -> tuple[float, str]:
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
