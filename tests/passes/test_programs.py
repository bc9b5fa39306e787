"""The passes make of captured graphs the programs that they made before, to the last node.

What changes a program on purpose writes them anew: `python -m tests.passes.programs --results`. Read the difference:
nodes, bytes and times are beside each digest, and `zgraph diff` shows where two programs part.
"""

import json

import pytest

from tests.deep import DEEP
from tests.passes.programs import CASES, GRAPHS, RESULTS, SEARCHED, graph_of, line, searched
from zgraph.ir import verify

KNOWN = json.loads(RESULTS.read_text())
LARGE = ("gpt2, ", "bf16-llama, ")
"""Budgets of these are for `make test-deep`."""


def is_run(name: str) -> bool:
    return DEEP or not (name.startswith(LARGE) and CASES[name].share is not None)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_are_valid(name):
    verify(graph_of(name))


def test_there_is_one_line_for_each():
    assert list(KNOWN) == [*CASES, *SEARCHED]


@pytest.mark.parametrize("name", filter(is_run, CASES))
def test_it_is_the_program_that_it_was(name):
    assert line(CASES[name]) == KNOWN[name]


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_has_the_choices_that_it_had(name):
    assert searched(*SEARCHED[name]) == KNOWN[name]
