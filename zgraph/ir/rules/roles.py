"""Roles that values have in an order of rows, which a sort has made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from zgraph.ir.rules.factors import Strategy

__all__ = ["Mixed", "Order", "Role", "Step"]


class Mixed(ValueError):
    """An op reads rows in an order of the rank's own otherwise than row by row."""


@dataclass(frozen=True)
class Order:
    """One order of rows.

    Args:
        name: of the sort that makes it.
        num_rows: rows of all ranks.
        blocks: in which the rows are cut over the ranks, as in `Shard`.
    """

    name: Hashable
    num_rows: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Role:
    """A value's part in an order.

    Args:
        word: what it is: `ids` that are sorted, `keys` that are sorted `ids`, `rows` in the order, `numbers` of a
            rank's own rows in the order, `range` of as many numbers, `inverse` numbers that put rows back, `counts` of
            rows by id.
        order: the order.
        dim: the dim of rows.
        per: how many rows have one number: rows of a token that goes to several experts.
    """

    word: str
    order: Order
    dim: int = 0
    per: int = 1


@dataclass(frozen=True)
class Step:
    """How an op is placed that reads what has a part in an order, and the parts of its results."""

    way: Strategy
    roles: tuple[Role | None, ...]
