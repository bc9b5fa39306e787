"""Spec of one kernel, as data with a text: operands, steps, and outputs.

    rms_norm 64: x bf16[M,N], w bf16[N] -> y bf16[M,N], r f32[M,1]; s = mul(x, x); t = row_sum(s); ...

A kernel works on rows of N columns. N is part of the spec, the number of rows M is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from zgraph.codegen.ops import SCALAR_OPS, Extent, joined
from zgraph.errors import KernelError
from zgraph.ir import DType

Arg = str | float
"""The name of a value, or a number."""

MAX_WHOLE_COLUMNS = 8192
"""Longer rows do not fit the registers of one program."""

ACC = "acc"
"""In the epilogue of a matmul: its product, which is not loaded."""

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_HEAD = re.compile(r"(?P<name>[a-z_]\w*) (?P<columns>[0-9]{1,18}): (?P<inputs>.*) -> (?P<outputs>.*)")
_OPERAND = re.compile(r"(?P<name>[a-z_]\w*) (?P<dtype>\w+)\[(?P<extent>M,N|M,1|N|)\]")
_STEP = re.compile(r"(?P<name>[a-z_]\w*) = (?P<op>[a-z_]+)\((?P<args>[^()]*)\)")


@dataclass(frozen=True)
class Operand:
    """A tensor in memory: one that is read, or one that is written under the name of a step."""

    name: str
    dtype: DType
    extent: Extent

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.value}[{self.extent.value}]"


@dataclass(frozen=True)
class Step:
    """A value made of others."""

    name: str
    op: str
    args: tuple[Arg, ...]

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(map(_arg_text, self.args))})"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel over rows.

    Args:
        name: a word for it.
        columns: N, the length of a row.
        inputs: what it reads.
        outputs: what it writes: inputs or steps that have rows, in other dtypes if wanted, or sums over rows.
        steps: in an order that runs.

    Raises:
        KernelError: it does not hold together.
    """

    name: str
    columns: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        extents = self.extents
        for output in self.outputs:
            if extents.get(output.name) is not output.extent:
                raise KernelError(f"{self.name} writes {output}, but makes no such value")
            if output.extent in (Extent.row, Extent.scalar) and output.name not in self.row_sums:
                raise KernelError(f"{self.name} writes {output}, which has no rows and is no sum over them")
        if len({output.name for output in self.outputs}) != len(self.outputs):
            raise KernelError(f"{self.name} writes a value twice; write a copy of it")
        if not self.outputs or self.columns < 1:
            raise KernelError(f"{self.name} must write something, of at least one column")

    @cached_property
    def extents(self) -> Mapping[str, Extent]:
        """The extent of every value."""
        found = {operand.name: operand.extent for operand in self.inputs}
        if len(found) != len(self.inputs):
            raise KernelError(f"two inputs of {self.name} share a name")
        summed: set[str] = set()
        for step in self.steps:
            op = SCALAR_OPS.get(step.op)
            if op is None or len(step.args) != op.num_args:
                raise KernelError(f"{self.name}: {step} is no operation; they are {', '.join(SCALAR_OPS)}")
            names = [a for a in step.args if isinstance(a, str)]
            if unknown := [n for n in names if n not in found or n in summed]:
                raise KernelError(f"{self.name}: {step} reads {unknown[0]}, which is not there by then")
            if step.name in found:
                raise KernelError(f"{self.name}: {step.name} is made twice")
            extent = op.makes or joined([found[n] for n in names])
            if op.reduces and extent is not Extent.full:
                raise KernelError(f"{self.name}: {step} reduces what has no rows and columns")
            if op.reduces == "rows":
                summed.add(step.name)
            found[step.name] = {"columns": Extent.column, "rows": Extent.row}.get(op.reduces, extent)
        return found

    @cached_property
    def frees(self) -> tuple[tuple[str, ...], ...]:
        """For each step the values that no later step reads and that are not written."""
        needed = {o.name for o in self.outputs}
        found = []
        for step in reversed(self.steps):
            touched = dict.fromkeys([a for a in step.args if isinstance(a, str)] + [step.name])
            found.append(tuple(name for name in touched if name not in needed))
            needed.update(touched)
        return tuple(reversed(found))

    @cached_property
    def row_sums(self) -> tuple[str, ...]:
        """The names of sums over all rows: only written, never read."""
        return tuple(step.name for step in self.steps if SCALAR_OPS[step.op].reduces == "rows")

    @cached_property
    def needs_whole_rows(self) -> bool:
        """Whether anything is summed or compared over the columns of a row."""
        return any(SCALAR_OPS[step.op].reduces == "columns" for step in self.steps)

    @property
    def is_epilogue(self) -> bool:
        """Whether it is what follows a matmul in one kernel."""
        return any(operand.name == ACC for operand in self.inputs)

    @property
    def is_looped(self) -> bool:
        """Whether it needs whole rows that are too long for one program to hold."""
        return self.needs_whole_rows and self.columns > MAX_WHOLE_COLUMNS

    def __str__(self) -> str:
        head = f"{self.name} {self.columns}: {_list(self.inputs)} -> {_list(self.outputs)}"
        return "; ".join([head, *map(str, self.steps)])

    @classmethod
    def parse(cls, text: str) -> KernelSpec:
        """The spec that a text writes.

        Raises:
            KernelError: it does not parse.
        """
        head, *steps = text.split("; ")
        match = _HEAD.fullmatch(head)
        if match is None:
            raise KernelError(f"expected NAME COLUMNS: INPUTS -> OUTPUTS, not {_shown(head)}")
        inputs, outputs = (tuple(_operands(match[side])) for side in ("inputs", "outputs"))
        return cls(match["name"], int(match["columns"]), inputs, outputs, tuple(map(parse_step, steps)))


def _operands(text: str) -> Iterator[Operand]:
    for part in re.split(r", (?=[a-z_])", text) if text else ():
        match = _OPERAND.fullmatch(part)
        if match is None or match["dtype"] not in DType.__members__:
            raise KernelError(f"expected an operand such as x bf16[M,N], not {_shown(part)}")
        yield Operand(match["name"], DType[match["dtype"]], Extent(match["extent"]))


def parse_step(text: str) -> Step:
    """A step such as `y = mul(x, 2.0)`. Raises KernelError for anything else."""
    match = _STEP.fullmatch(text)
    if match is None:
        raise KernelError(f"expected a step such as y = mul(x, 2.0), not {_shown(text)}")
    return Step(match["name"], match["op"], tuple(map(_arg, match["args"].split(", "))))


def _arg(text: str) -> Arg:
    if _NAME.fullmatch(text) and text not in ("inf", "nan"):
        return text
    try:
        return float(text)
    except ValueError:
        raise KernelError(f"expected a name or a number, not {_shown(text)}") from None


def _arg_text(arg: Arg) -> str:
    return arg if isinstance(arg, str) else repr(float(arg))


def _list(operands: tuple[Operand, ...]) -> str:
    return ", ".join(map(str, operands))


def _shown(text: str) -> str:
    """A text as an error has it."""
    return repr(text if len(text) <= 200 else f"{text[:197]}...")
