"""Bytes that the collectives of a plan put on the wire."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.ir import OPS, Plan
from zgraph.ir.ranked_rows import ROUNDS


@dataclass(frozen=True, slots=True)
class Traffic:
    """Traffic of one kind of collective in one step: the number of calls, and the bytes that one rank sends in all."""

    op: str
    phase: str
    num_calls: int
    sent_bytes: int


def traffic(plan: Plan) -> tuple[Traffic, ...]:
    """The collectives of one step, by kind and phase, in the order in which they first occur, then rounds of keys."""
    found: dict[tuple[str, str], list[int]] = {}
    for node in (*plan.collectives, *(n for n in plan.graph.nodes if n.op in ROUNDS)):
        sent = OPS[node.op].wire_bytes(node, plan.graph.mesh)
        found.setdefault((node.op, node.phase.value), []).append(sent)
    return tuple(Traffic(op, phase, len(sent), sum(sent)) for (op, phase), sent in found.items())
