"""Keep or recompute: the solver's answers are those of trying every choice."""

from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zgraph.passes.analysis.blocks import Block, Choice, Maker, cheapest, chosen, frontier, within


@st.composite
def blocks(draw) -> Block:
    """Up to eight values: imports, then makers of one or two values each."""
    num_imports = draw(st.integers(0, 2))
    values, makers = num_imports, []
    for _ in range(draw(st.integers(1, 5))):
        reads = draw(st.sets(st.integers(0, values - 1), max_size=2)) if values else set()
        count = draw(st.integers(1, 2))
        us = draw(st.sampled_from([0.0, 1.0, 2.0, 5.0, 11.0]))
        makers.append(
            Maker(us, tuple(sorted(reads)), tuple(range(values, values + count)), draw(st.integers(0, 4)) > 0)
        )
        values += count
    num_bytes = tuple(draw(st.integers(0, 9)) for _ in range(values))
    may_keep = tuple(draw(st.integers(0, 4)) > 0 for _ in range(values))
    needed = draw(st.sets(st.integers(0, values - 1), min_size=1))
    return Block(num_bytes, may_keep, tuple(makers), frozenset(needed))


def every_choice(block: Block) -> list[Choice]:
    keepable = [v for v, may in enumerate(block.may_keep) if may]
    kept = chain.from_iterable(combinations(keepable, n) for n in range(len(keepable) + 1))
    return [choice for k in kept if (choice := chosen(block, k)) is not None]


@settings(max_examples=500, deadline=None)
@given(blocks(), st.integers(0, 40))
def test_the_choice_within_some_bytes_is_the_best_of_all(block, max_bytes):
    wanted = min((c.us for c in every_choice(block) if c.num_bytes <= max_bytes), default=None)
    found = within(block, max_bytes)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert found.us == pytest.approx(wanted)
        assert found.num_bytes <= max_bytes


@settings(max_examples=300, deadline=None)
@given(blocks(), st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 100.0]))
def test_the_choice_at_a_price_is_the_best_of_all(block, price):
    choices = every_choice(block)
    found = cheapest(block, price)
    assert (found is None) == (not choices)
    if found is not None:
        assert found.us + price * found.num_bytes == pytest.approx(min(c.us + price * c.num_bytes for c in choices))


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_the_corners_go_from_all_kept_to_the_fewest_bytes(block):
    corners, choices = frontier(block), every_choice(block)
    assert bool(corners) == bool(choices)
    if corners:
        assert corners[0].us == pytest.approx(min(c.us for c in choices))
        assert corners[-1].num_bytes == min(c.num_bytes for c in choices)
        assert all(a.num_bytes > b.num_bytes for a, b in pairwise(corners))
        slopes = [(b.us - a.us) / (a.num_bytes - b.num_bytes) for a, b in pairwise(corners)]
        assert all(s <= t + 1e-9 for s, t in pairwise(slopes))


def test_a_chain_is_recomputed_from_its_cheapest_cut():
    """x -> a (large, cheap) -> b (small, dear) -> c (large, cheap): only b is worth its bytes."""
    makers = (Maker(1.0, (0,), (1,)), Maker(100.0, (1,), (2,)), Maker(1.0, (2,), (3,)))
    block = Block((4, 50, 5, 50), (True,) * 4, makers, frozenset({1, 2, 3}))
    found = within(block, 12)
    assert found is not None
    assert found.kept == {0, 2}
    assert found.us == 2.0
