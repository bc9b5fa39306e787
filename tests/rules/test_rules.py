"""The sharding rules as a specification: what ranks with parts make together is what one makes of the whole."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.deep import DEEP
from tests.rules.calls import calls
from tests.rules.cases import random_case, run, strategies, tolerance
from zgraph.ir import Shard
from zgraph.ir.rules import RULES, Cut, Rule

ROUNDS = 60 if DEEP else 8


def test_every_rule_has_calls() -> None:
    assert calls(random.Random(0)).keys() == RULES.keys()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_sharded_is_whole(num_ranks: int) -> None:
    ways: Counter[str] = Counter()
    for op in RULES:
        for seed in range(6 * ROUNDS):
            if seed >= ROUNDS and ways[op]:
                break
            case, rule, r = random_case(1000 * num_ranks + seed, op)
            if rule is None:
                continue
            found = strategies(rule, num_ranks, r)[1:]
            for strategy in r.sample(found, min(2, len(found))):
                error = run(case, rule, strategy, num_ranks)
                assert error < tolerance(case), (op, seed, strategy, error)
                ways[op] += 1
    never = RULES.keys() - ways.keys()
    assert never <= {f"aten.{op}" for op in ("scalar_tensor.default", "arange.default", "arange.start")} | {
        "aten.arange.start_step"
    }
    assert sum(ways.values()) > 4 * len(RULES) * ROUNDS // 5


def test_a_cut_of_a_view_in_blocks() -> None:
    rule = Rule(((("b",), ("h", "d")),), ((("b",), ("h",), ("d",)),), {"b": 2, "h": 4, "d": 6})
    assert rule.cut(rule.ins[0], Shard(1), 2) == ("h", (1,))
    assert rule.cut(rule.ins[0], Shard(1, (1,) * 4), 2) == ("d", (1,))
    assert rule.place(rule.ins[0], ("d", (1,))) == Shard(1, (1,) * 4)
    assert rule.place(rule.outs[0], ("d", (1,))) == Shard(2)


@pytest.mark.parametrize(
    ("whole", "part"),
    [((1, 1, 1), (1,)), ((4, 1, 1), (1,)), ((2, 2, 1, 1, 1, 1), None), ((3, 1, 1), None), ((1,), None)],
)
def test_joined_parts(whole: tuple[int, ...], part: tuple[int, ...] | None) -> None:
    sizes = (8, 2, 2) if whole != (1, 1, 1) else (4, 4, 4)
    rule = Rule(((("x+",),),), ((("x",),),) * 3, {"x": 0}, joins={"x": sizes})
    cut: Cut | None = None if part is None else ("x", part)
    assert rule.cut(rule.ins[0], Shard(0, whole), 2) == cut
    if cut is not None:
        assert rule.place(rule.ins[0], cut) == Shard(0, whole)
