"""What passes work out on the way to a program is what it was: problems, prices, choices and clocks.

What changes one on purpose writes the digests anew: `python -m tests.passes.workings`. The texts of what one of
`WORKINGS` gives, before and after, show where they part.
"""

import json

import pytest

from tests.passes.workings.cases import RESULTS, WORKINGS, digest

KNOWN = json.loads(RESULTS.read_text())


def test_there_is_one_digest_for_each():
    assert list(KNOWN) == list(WORKINGS)


@pytest.mark.parametrize("name", WORKINGS)
def test_it_is_worked_out_as_it_was(name):
    assert digest(name) == KNOWN[name]
