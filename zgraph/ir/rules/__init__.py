"""Sharding rules: how the operands and results of an op may be placed along a model axis. One row an op.

An op without a row has its operands whole, which is right for any op that computes on one rank. The table is a
specification: `tests/rules` runs each row sharded and whole, on random shapes, in float64.
"""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Cut, Rule, Strategy
from zgraph.ir.rules.local import localised, whole_node
from zgraph.ir.rules.ranked import PARTS, ROUTED, meant, on_parts
from zgraph.ir.rules.table import RULES, rule_of

__all__ = [
    "PARTS",
    "ROUTED",
    "RULES",
    "Call",
    "Cut",
    "Rule",
    "Strategy",
    "localised",
    "meant",
    "on_parts",
    "rule_of",
    "whole_node",
]
