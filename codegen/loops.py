"""Looped reductions: over blocks of columns, for rows that no program can hold whole.

A sum or maximum over the columns of a row is there when a loop over all of them is over. The *level* of a value is how
many such reductions come before it, one after the other. Loop L accumulates the reductions of what has level L. What
has one number for each row is kept from loop to loop; what has columns is read and made again in each that needs it.
All that is written and has columns is written in one loop, the first that can make it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from zgraph.codegen.ops import SCALAR_OPS, Extent
from zgraph.codegen.spec import KernelSpec, Operand, Step

_WITH_COLUMNS = (Extent.full, Extent.row)


@dataclass(frozen=True)
class Loop:
    """One loop over the columns of some rows.

    Args:
        before: steps with one number for each row, made before it.
        inputs: operands that it reads of each block of columns.
        steps: what it makes of that.
        outputs: what it writes.
    """

    before: tuple[Step, ...]
    inputs: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]

    @property
    def reductions(self) -> tuple[Step, ...]:
        """Steps whose value is there when it is over."""
        return tuple(step for step in self.steps if SCALAR_OPS[step.op].reduces == "columns")


def loops(spec: KernelSpec) -> list[Loop]:
    """The loops of a kernel, in order; the last may only make what has one number for each row."""
    levels = _levels(spec)
    written = [output for output in spec.outputs if output.extent in _WITH_COLUMNS]
    writes_at = max((levels[output.name] for output in written), default=0)
    return [_loop(spec, levels, at, written if at == writes_at else []) for at in range(max(levels.values()) + 1)]


def _levels(spec: KernelSpec) -> Mapping[str, int]:
    """The level of every value."""
    found = {operand.name: 0 for operand in spec.inputs}
    for step in spec.steps:
        before = max((found[a] for a in step.args if isinstance(a, str)), default=0)
        found[step.name] = before + (SCALAR_OPS[step.op].reduces == "columns")
    return found


def _loop(spec: KernelSpec, levels: Mapping[str, int], level: int, outputs: list[Operand]) -> Loop:
    kept = [step for step in spec.steps if spec.extents[step.name] is Extent.column]
    reduced = {step.name for step in kept if SCALAR_OPS[step.op].reduces}
    goals = {name for name in reduced if levels[name] == level + 1}.union(o.name for o in outputs)
    needed = _needed(spec, goals)
    return Loop(
        tuple(step for step in kept if step.name not in reduced and levels[step.name] == level),
        tuple(operand for operand in spec.inputs if operand.name in needed),
        tuple(step for step in spec.steps if step.name in needed),
        tuple(outputs),
    )


def _needed(spec: KernelSpec, goals: Collection[str]) -> set[str]:
    """The values with columns that others are made of, and those themselves."""
    needed = set(goals)
    for step in reversed(spec.steps):
        if step.name in needed:
            needed.update(a for a in step.args if isinstance(a, str) and spec.extents[a] in _WITH_COLUMNS)
    return needed
