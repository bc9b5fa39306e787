"""Names for torch's profiler: what a program does is found in a trace under the names that the plan has for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.profiler import record_function

from zgraph.ir import Instruction
from zgraph.runtime.stretches import Part, Stretch


class Ranges:
    """Opens a range of `torch.profiler` for each instruction of a program, and closes it when that is done.

    A range is called `%name op`, as the line of the node in the graph's text; that of a region or a stretch, after the
    first and the last of its nodes.
    """

    takes_apart = False

    def __init__(self) -> None:
        self._names: Iterator[str] = iter(())
        self._open: record_function | None = None

    def begin(self, parts: Sequence[Part | Stretch]) -> None:
        """A program begins."""
        self._names = map(_name, parts)
        self.mark()  # where the program before it failed, a range is open still

    def mark(self) -> None:
        """An instruction is done."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
        name = next(self._names, None)
        self._open = None if name is None else record_function(name)
        if self._open is not None:
            self._open.__enter__()  # type: ignore[no-untyped-call]


def _name(part: Part | Stretch) -> str:
    if isinstance(part, Instruction):
        return f"%{part.node.name} {part.node.op}"
    if isinstance(part, Stretch):
        return f"%{part.name}, as one"
    return f"%{part.nodes[0].name} to %{part.nodes[-1].name}, compiled"
