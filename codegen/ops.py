"""The scalar operations that kernels are made of: one row each, with its Triton text; `reference.py`
has the reference implementation in torch.

Everything is computed in fp32. A value has an *extent*: `full` is one number for each row and column, `column` one for
each row, `row` one for each column, `scalar` one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

D = TypeVar("D")


class Extent(enum.Enum):
    """Extent of a value over a kernel's rows and columns; the text of each member is the shape."""

    full = "M,N"
    column = "M,1"
    row = "N"
    scalar = ""

    def shape(self, rows: tuple[D, ...], columns: int) -> tuple[D | int, ...]:
        """The shape of a value, where these dims together count the rows."""
        shapes: dict[Extent, tuple[D | int, ...]] = {
            Extent.full: (*rows, columns),
            Extent.column: (*rows, 1),
            Extent.row: (columns,),
            Extent.scalar: (),
        }
        return shapes[self]


@dataclass(frozen=True)
class ScalarOp:
    """One operation.

    Args:
        name: what specs call it.
        num_args: how many values or numbers it takes.
        triton: its Triton expression, with {0}, {1}, ... for the arguments.
        reduces: "columns" for a sum or maximum over the columns of each row, "rows" for a sum over all rows.
        makes: the extent of the result, where that of the arguments does not say.
    """

    name: str
    num_args: int
    triton: str
    reduces: str = ""
    makes: Extent | None = None


_ROWS = (
    ScalarOp("copy", 1, "{0}"),
    ScalarOp("add", 2, "{0} + {1}"),
    ScalarOp("sub", 2, "{0} - {1}"),
    ScalarOp("mul", 2, "{0} * {1}"),
    ScalarOp("div", 2, "{0} / {1}"),
    ScalarOp("neg", 1, "-{0}"),
    ScalarOp("exp", 1, "tl.exp({0})"),
    ScalarOp("log", 1, "tl.log({0})"),
    ScalarOp("sqrt", 1, "tl.sqrt({0})"),
    ScalarOp("rsqrt", 1, "1.0 / tl.sqrt({0})"),
    ScalarOp("erf", 1, "tl.erf({0})"),
    ScalarOp("sigmoid", 1, "1.0 / (1.0 + tl.exp(-{0}))"),
    ScalarOp("tanh", 1, "2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0"),
    ScalarOp("maximum", 2, "tl.maximum({0}, {1})"),
    ScalarOp("minimum", 2, "tl.minimum({0}, {1})"),
    ScalarOp("less", 2, "({0} < {1}).to(tl.float32)"),
    ScalarOp("where", 3, "tl.where({0} != 0.0, {1}, {2})"),
    ScalarOp("random", 1, "tl.rand({0}, at)", makes=Extent.full),
    ScalarOp("row_sum", 1, "tl.sum({0}, axis=1)[:, None]", "columns"),
    ScalarOp("row_max", 1, "tl.max({0}, axis=1)[:, None]", "columns"),
    ScalarOp("col_sum", 1, "tl.sum({0}, axis=0)", "rows"),
)

SCALAR_OPS: Mapping[str, ScalarOp] = {op.name: op for op in _ROWS}

NEUTRAL: Mapping[str, str] = {"row_sum": "0.0", "row_max": "float('-inf')", "col_sum": "0.0"}
"""Neutral number of each reduction, put in place of columns and rows beyond the last."""

JOINED: Mapping[str, str] = {"row_sum": "{0} + {1}", "row_max": "tl.maximum({0}, {1})"}
"""How reductions over the columns of two blocks become one."""


def joined(extents: list[Extent]) -> Extent:
    """The extent of what is made of values of these."""
    has_rows = any(e in (Extent.full, Extent.column) for e in extents)
    has_columns = any(e in (Extent.full, Extent.row) for e in extents)
    if has_rows:
        return Extent.full if has_columns else Extent.column
    return Extent.row if has_columns else Extent.scalar
