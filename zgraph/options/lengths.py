"""Lengths that a model is captured with, for kernels that want static shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zgraph.errors import UsageError, did_you_mean, nearest


@dataclass(frozen=True)
class Lengths:
    """Lengths that inputs are padded to, each captured once with static shapes.

        zgraph.compile(model, lengths=Lengths((128, 256, 512), {"input_ids": 0, "attention_mask": 0, "labels": -100}))

    The padded model must compute the same for what was there: a mask hides padding where attention would look at it,
    and labels there do not count.

    Args:
        sizes: the lengths, ascending. An input is padded at its end to the first that is long enough.
        pad: the value that each padded argument of the forward is padded with; None for one that has no lengths though
            its size looks like one.
        dim: the dimension of lengths, of inputs and outputs.
        optional: arguments in `pad` that a call may leave out.
        cut: entries of the output that are cut back to the length that was given: keys, or positions in a tuple (of a
            tensor alone, 0). Some may be absent.
        keep: entries that are left as they are though their size is the padded length.

    Raises:
        UsageError: the sizes are not ascending, or nothing is padded.
    """

    sizes: Sequence[int]
    pad: Mapping[str, float | None]
    dim: int = 1
    optional: Sequence[str] = ("labels",)
    cut: Sequence[str | int] = field(default=("logits", 0))
    keep: Sequence[str | int] = ()

    def __post_init__(self) -> None:
        sizes = [*self.sizes]
        if not sizes or not all(type(s) is int and s > 0 for s in sizes) or sizes != sorted({*sizes}):
            raise UsageError(f"sizes of Lengths must be ascending numbers, such as (128, 256, 512), not {self.sizes!r}")
        if all(value is None for value in self.pad.values()):
            raise UsageError('Lengths pads nothing; name inputs with values: pad={"input_ids": 0, "labels": -100}')
        if self.dim < 0:
            raise UsageError(f"dim of Lengths must count from the front, not {self.dim}")

    @property
    def text(self) -> str:
        """Text of the values that must be the same on all ranks."""
        return f"{[*self.sizes]} along {self.dim}, padded by {sorted(self.pad.items(), key=str)}"

    def size_for(self, length: int) -> int:
        """The first of the sizes that takes this length. Raises UsageError if none does."""
        for size in self.sizes:
            if size >= length:
                return size
        raise UsageError(
            f"an input of length {length} is longer than the largest of lengths, {self.sizes[-1]}; cut it before the "
            f"call, or give lengths=Lengths((..., {length}), ...)"
        )


def check_lengths(lengths: Lengths | None, forward: Callable[..., Any], dynamic: bool | None) -> None:
    """Raise UsageError for lengths that do not fit a model's forward or other options."""
    if lengths is None:
        return
    if not isinstance(lengths, Lengths):
        raise UsageError(f"lengths must be a zgraph.Lengths, such as Lengths((128, 256), {{'x': 0}}), not {lengths!r}")
    if dynamic:
        raise UsageError("lengths= captures with static shapes; leave dynamic=True out")
    known = inspect.signature(forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in lengths.pad:
        if name not in known and (not takes_any or nearest(name, known)):
            hint = did_you_mean(name, known, f"its arguments are {', '.join(known)}")
            raise UsageError(f"lengths pads {name}, which is no argument of the model's forward; {hint}")
