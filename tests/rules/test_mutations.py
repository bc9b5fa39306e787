"""A table of sharding rules with one mistake in it is caught by its specification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.deep import DEEP
from tests.rules.cases import Case, random_case, run, strategies, tolerance
from zgraph.ir import DType
from zgraph.ir.rules import RULES, Rule
from zgraph.ir.rules import kept as kept_rules

NUM_CASES = 40 if DEEP else 12

RIGHT = {
    ("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", "cuts _s"),
    ("aten.arange.default", "leaves sizes"),
}
"""No mistakes: with the whole log of sums, gradients of keys are those of their part, and those of queries add up; and
no factor of a range is cut: one in an order of the rank's own has the size of its part (`tests/interp/test_own_rows`).
"""


def mutations(rule: Rule, case: Case) -> Iterator[tuple[str, Rule]]:
    """Rules that are wrong in one way."""
    whole = sorted(
        f
        for f, size in rule.sizes.items()
        if f[0] == "_" and isinstance(size, int) and size > 1 and f"x{f}" not in rule.sizes
    )
    for factor in whole[:2]:
        yield f"cuts {factor}", _renamed(rule, factor, factor.lstrip("_") + "free")
    is_float = all(d in (None, DType.f64) for d in case_dtypes(case))
    if is_float and not rule.linear and any(d is not None for d in rule.ins):
        yield "is linear in all", replace(rule, linear=(tuple(i for i, d in enumerate(rule.ins) if d is not None),))
    if len(rule.linear) == 2 and rule.linear[0] != rule.linear[1]:
        yield "is linear in both", replace(rule, linear=((*rule.linear[0], *rule.linear[1]),))
    if rule.added:
        yield "adds on every rank", replace(rule, added=())
    if rule.local:
        yield "leaves sizes", replace(rule, local=())


def case_dtypes(case: Case) -> list[DType | None]:
    return [getattr(v.type, "dtype", None) for v in (*case.node.operands, *case.node.results)]


def _renamed(rule: Rule, old: str, new: str) -> Rule:
    def names(tensors: tuple) -> tuple:  # type: ignore[type-arg]
        return tuple(d and tuple(tuple(new if f == old else f for f in group) for group in d) for d in tensors)

    sizes = {new if f == old else f: size for f, size in rule.sizes.items()}
    return replace(rule, ins=names(rule.ins), outs=names(rule.outs), sizes=sizes)


def is_caught(op: str, what: str, monkeypatch: pytest.MonkeyPatch) -> bool | None:
    """Whether some case of an op fails with a mistake in its rule; None where none has room for the mistake."""
    met = None
    for seed in range(NUM_CASES):
        case, rule, r = random_case(seed, op)
        wrong = dict(mutations(rule, case)).get(what) if rule is not None else None
        if wrong is None:
            continue
        assert rule is not None
        monkeypatch.setattr(kept_rules, "rule_of", lambda call, wrong=wrong: wrong)
        right = set(strategies(rule, 2, r))
        for strategy in strategies(wrong, 2, r):
            if strategy in right and what not in ("leaves sizes",):
                continue
            met = bool(met)
            try:
                if not run(case, wrong, strategy, 2) < 1e3 * tolerance(case):
                    return True
            except Exception:
                return True
    return met


def test_mistakes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[tuple[str, str], bool] = {}
    for op in RULES:
        names = {
            what
            for seed in range(3)
            for case, rule, _ in [random_case(seed, op)]
            if rule is not None
            for what, _ in mutations(rule, case)
        }
        for what in sorted(names):
            if (caught := is_caught(op, what, monkeypatch)) is not None:
                found[op, what] = caught
    missed = [key for key, caught in found.items() if not caught and key not in RIGHT]
    assert len(found) > 100
    assert len(missed) <= 0.02 * len(found), missed
