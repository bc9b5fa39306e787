"""Rows of the table of zgraph's own ops (`zgraph.ir.ops`): everything that the compiler asks about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from zgraph.ir.graph import Node
from zgraph.ir.type_rules import TypeRule
from zgraph.ir.types import Mesh

Lane = Literal["compute", "comm", "d2h", "h2d"]
"""Lane that runs an op: computing, the network, or copies from the device to its host and back."""

LANES: tuple[Lane, ...] = get_args(Lane)

Kind = Literal["gather", "reduce", "copy", "wait", "place"]
"""How a report draws an op: colour and glyph."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Transfer that a start begins: a collective, or a copy between the device and its host.

    Args:
        name: its name in cost tables and profiles: `all_gather`, `offload`, ...
        brings: an op needs what it delivers, in memory that is released after its last use. The others take away what
            no op needs any more.
        exchanges: it moves what an op has made along a model axis, and an op needs what it delivers.
        reduces: it sums or averages over the ranks, or takes the first rank's.
        holds: it reads its operand until it is waited for; the others copy it first.
        scatters: each rank keeps a part of the result. If the operand is not dense, or needs padding, a copy of it is
            sent.
        is_shared: all ranks take part in it as equals, whatever the mesh.
    """

    name: str
    brings: bool = False
    exchanges: bool = False
    reduces: bool = False
    holds: bool = False
    scatters: bool = False
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One row.

    Args:
        name: the op's name in text.
        doc: one line of what it does.
        rule: from a node and the mesh to the types its results must have; raises TypeRuleError.
        lane: which lane runs it.
        wire_bytes: bytes this rank sends, from a node and the mesh.
        scratch_bytes: bytes it needs beside operands and results while it runs.
        views: whether its results share memory with its operands.
        pure: running it has no effect but its results, the same each time.
        consumes: it ends the life of its operands.
        recomputable: it may be run again instead of keeping its result.
        transfer: what a start moves; None for all other ops.
        chunks: into how many chunks of one size its whole results are cut, from the mesh; None where into none.
        lies_in_arena: whether its results may have fixed places in an arena.
        prepares: whether it only prepares a start, where nothing else reads what it makes.
        is_work: whether it reads and writes the memory of its operands and results, on the compute lane.
        kind: how a report draws it.
    """

    name: str
    doc: str
    rule: TypeRule
    lane: Lane = "compute"
    wire_bytes: Callable[[Node, Mesh], int] = lambda node, mesh: 0
    scratch_bytes: Callable[[Node, Mesh], int] = lambda node, mesh: 0
    views: Callable[[Node], bool] = lambda node: False
    pure: bool = True
    consumes: bool = False
    recomputable: bool = False
    transfer: Transfer | None = None
    chunks: Callable[[Mesh], int] | None = None
    lies_in_arena: bool = False
    prepares: bool = False
    is_work: bool = False
    kind: Kind = "place"
