"""Keep or recompute: the solver's answers are those of trying every choice."""

from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zgraph.passes.analysis import blocks as blocks_module
from zgraph.passes.analysis.blocks import Block, Choice, Maker, around, cheapest, chosen, frontier, within


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
        for corner, price in zip(corners, slopes, strict=False):
            line = corner.us + price * corner.num_bytes
            assert all(c.us + price * c.num_bytes >= line - 1e-6 for c in choices), "a corner was left out"


def test_a_chain_is_recomputed_from_its_cheapest_cut():
    """x -> a (large, cheap) -> b (small, dear) -> c (large, cheap): only b is worth its bytes."""
    makers = (Maker(1.0, (0,), (1,)), Maker(100.0, (1,), (2,)), Maker(1.0, (2,), (3,)))
    block = Block((4, 50, 5, 50), (True,) * 4, makers, frozenset({1, 2, 3}))
    found = within(block, 12)
    assert found is not None
    assert found.kept == {0, 2}
    assert found.us == 2.0


X, A, B, C, Y = range(5)
DIAMOND = Block(
    (4, 50, 5, 60, 7),
    (True,) * 5,
    (Maker(1.0, (X,), (A,)), Maker(100.0, (A,), (B,)), Maker(2.0, (A, B), (C,)), Maker(8.0, (B, C), (Y,), False)),
    frozenset({A, B, C, Y}),
)
"""x -> a -> b (dear) -> c, and y, which may not run again."""


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        ({A, B, C, Y}, Choice(frozenset({A, B, C, Y}), frozenset(), 122, 0.0)),
        ({X, A, B, C, Y}, Choice(frozenset({A, B, C, Y}), frozenset(), 122, 0.0)),
        ({X, B, Y}, Choice(frozenset({X, B, Y}), frozenset({0, 2}), 16, 3.0)),
        ({X, Y}, Choice(frozenset({X, Y}), frozenset({0, 1, 2}), 11, 103.0)),
        ({A, B, C}, None),
        ({B, C, Y}, None),
        (set(), None),
    ],
)
def test_what_follows_from_what_is_kept(kept, wanted):
    """Values that nothing reads then are not kept; what cannot be made again must be."""
    assert chosen(DIAMOND, kept) == wanted


def test_a_block_of_which_nothing_is_needed_keeps_nothing():
    block = Block((4,), (True,), (Maker(1.0, (), (0,)),), frozenset())
    nothing = Choice(frozenset(), frozenset(), 0, 0.0)
    assert cheapest(block, 1.0) == within(block, 0) == nothing
    assert frontier(block) == (nothing,)


def test_the_corners_around_a_number_of_bytes():
    corners = frontier(DIAMOND)
    assert [c.num_bytes for c in corners] == [122, 76, 16, 11]
    assert [around(DIAMOND, room) for room in (200, 122)] == [corners[:1]] * 2
    assert [around(DIAMOND, room) for room in (121, 76)] == [corners[:2]] * 2
    assert [around(DIAMOND, room) for room in (75, 16)] == [corners[1:3]] * 2
    assert [around(DIAMOND, room) for room in (15, 11)] == [corners[2:]] * 2
    assert [around(DIAMOND, room) for room in (10, 0)] == [corners[3:]] * 2


def test_between_corners_a_view_is_never_kept():
    """Of two pairs, each a value and a view of it, the room is for one value."""
    makers = (Maker(3.0, (), (0,)), Maker(0.0, (0,), (1,)), Maker(4.0, (), (2,)), Maker(0.0, (2,), (3,)))
    block = Block((6, 1, 6, 1), (True, False, True, False), makers, frozenset({1, 3}))
    assert within(block, 6) == Choice(frozenset({2}), frozenset({0, 1, 3}), 6, 3.0)
    assert within(block, 5) == Choice(frozenset(), frozenset({0, 1, 2, 3}), 0, 7.0)


SIZES, TIMES = (5, 7, 11, 13, 9, 6), (6.0, 9.0, 12.0, 17.0, 11.0, 7.0)
KNAPSACK = Block(SIZES, (True,) * 6, tuple(Maker(us, (), (v,)) for v, us in enumerate(TIMES)), frozenset(range(6)))
"""Values that have nothing to do with each other."""


def relaxed(monkeypatch: pytest.MonkeyPatch, room: int, max_work: int = blocks_module.MAX_WORK) -> int:
    """How often a search relaxes its block."""
    rooms: list[int] = []
    monkeypatch.setattr(blocks_module, "around", lambda block, room: rooms.append(room) or around(block, room))
    monkeypatch.setattr(blocks_module, "MAX_WORK", max_work)
    assert within(KNAPSACK, room) is not None
    assert min(rooms) >= 0
    return len(rooms)


@pytest.mark.parametrize("room", [0, 4, 5, 12, 17, 18, 24, 30, 33, 38, 45, 50, 51])
def test_values_apart_are_packed_as_tightly_as_they_can_be(room, monkeypatch):
    best = min(c.us for c in every_choice(KNAPSACK) if c.num_bytes <= room)
    found = within(KNAPSACK, room)
    assert found is not None
    assert found.us == best
    assert relaxed(monkeypatch, room) <= 36, "the bound cuts most of the 64 off"


@pytest.mark.parametrize(("max_work", "wanted"), [(12, 2), (13, 3), (18, 3)])
def test_a_search_ends_when_it_has_worked_enough(max_work, wanted, monkeypatch):
    assert relaxed(monkeypatch, 33) > 3
    assert relaxed(monkeypatch, 33, max_work) == wanted
