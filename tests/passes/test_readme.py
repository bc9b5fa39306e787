"""The table of the passes is written from the passes."""

from zgraph.passes import ALL
from zgraph.passes.readme import PATH, render


def test_the_table_is_up_to_date():
    assert PATH.read_text() == render(), "run: python -m zgraph.passes.readme"


def test_every_pass_has_a_row():
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [kind.name for kind in ALL]
    assert all(row.count("|") == 7 for row in rows)
    assert all(row.split("|")[2].strip().endswith(".") for row in rows)
