"""The exact evaluator against brute force, and the search against the plain order."""

from __future__ import annotations

from itertools import pairwise, permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from zgraph.passes.analysis.timetable import (
    HeadroomTree,
    Problem,
    Timetable,
    Transfer,
    delayed,
    evaluate,
    first_use_order,
    run,
    search,
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    num_ops = draw(st.integers(1, 5))
    transfers = []
    for _ in range(draw(st.integers(0, 4))):
        due = draw(st.integers(0, num_ops))
        first = draw(st.integers(0, due))
        is_gather = draw(st.booleans())
        num_bytes = draw(st.integers(0, 4)) if is_gather else 0
        transfers.append(Transfer(float(draw(st.integers(0, 9))), first, due, num_bytes, due if is_gather else first))
    us = draw(st.lists(st.integers(0, 9), min_size=num_ops, max_size=num_ops))
    headroom = draw(st.lists(st.integers(0, 6), min_size=num_ops, max_size=num_ops))
    return Problem(tuple(map(float, us)), tuple(headroom), tuple(transfers))


def placements(problem: Problem, order: tuple[int, ...]) -> list[Timetable]:
    """Every placement of the transfers that has this order and headroom, on the clock."""
    found = []
    choices = [range(t.first, t.due + 1) for t in problem.transfers]
    for starts in product(*choices):
        if any(starts[a] > starts[b] for a, b in pairwise(order)):
            continue
        if any(held(problem, starts, op) > problem.headroom[op] for op in range(problem.num_ops)):
            continue
        found.append(run(problem, order, starts))
    return found


def held(problem: Problem, starts: tuple[int, ...], op: int) -> int:
    return sum(t.num_bytes for t, at in zip(problem.transfers, starts, strict=True) if at <= op < t.until)


@settings(max_examples=600, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_evaluator_finds_what_brute_force_finds(problem, random):
    order = list(range(len(problem.transfers)))
    random.shuffle(order)
    possible = placements(problem, tuple(order))
    found = evaluate(problem, order)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert found.makespan_us == min(t.makespan_us for t in possible)
    assert all(held(problem, found.starts, op) <= problem.headroom[op] for op in range(problem.num_ops))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_starting_later_costs_no_time_and_holds_no_more(problem):
    found = search(problem)
    if found is None:
        return
    late = delayed(problem, found)
    assert late.makespan_us <= found.makespan_us + 1e-9
    assert all(a >= b for a, b in zip(late.starts, found.starts, strict=True))
    assert all(held(problem, late.starts, op) <= held(problem, found.starts, op) for op in range(problem.num_ops))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_search_lies_between_the_bound_and_first_use_order(problem):
    found, plain = search(problem), evaluate(problem, first_use_order(problem))
    every = [evaluate(problem, order) for order in permutations(range(len(problem.transfers)))]
    possible = [t.makespan_us for t in every if t is not None]
    if plain is not None:
        assert found is not None
        assert found.makespan_us <= plain.makespan_us
    if found is not None:
        assert found.makespan_us >= min(possible) >= problem.lower_bound_us - 1e-9


def test_a_reduction_goes_while_the_next_gather_has_time():
    gather, reduction = Transfer(4.0, 0, 2, 1, 2), Transfer(4.0, 1, 3)
    problem = Problem((5.0, 10.0, 1.0), (9, 9, 9), (gather, reduction))
    found = search(problem)
    assert found is not None
    assert found.makespan_us == 16.0
    assert found.stalls == ()


def test_a_stall_names_the_transfer_and_the_time():
    problem = Problem((2.0, 3.0), (9, 9), (Transfer(7.0, 0, 1, 4, 1),))
    found = evaluate(problem, (0,))
    assert found is not None
    assert found.stalls == ((1, 0, 5.0),)
    assert found.makespan_us == 10.0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.data())
def test_room_is_that_of_a_plain_list(sizes, data):
    headroom, plain = HeadroomTree(sizes), list(sizes)
    for _ in range(data.draw(st.integers(0, 8))):
        begin = data.draw(st.integers(0, len(plain) - 1))
        end = data.draw(st.integers(begin + 1, len(plain)))
        num_bytes = data.draw(st.integers(0, 9))
        headroom.take(num_bytes, begin, end)
        plain[begin:end] = [left - num_bytes for left in plain[begin:end]]
        asked = data.draw(st.integers(-5, 20))
        wanted = max((i for i in range(end) if plain[i] < asked), default=-1)
        assert headroom.last_below(asked, end) == wanted
