"""The table of the passes is written from the passes, and what they are made of cannot be changed."""

import ast
import runpy
from pathlib import Path

import pytest

from zgraph.passes import ALL
from zgraph.passes.core.readme import PATH, render


def test_the_table_is_up_to_date():
    assert PATH.read_text() == render(), "run: python -m zgraph.passes.core.readme"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_writes_it(monkeypatch):
    written = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    runpy.run_module("zgraph.passes.core.readme", run_name="__main__")
    assert written == {PATH: render()}


def test_every_pass_has_a_row():
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [kind.name for kind in ALL]
    assert all(row.count("|") == 7 for row in rows)
    assert all(row.split("|")[2].strip().endswith(".") for row in rows)


LOOSE = {"rows.Group", "instruments.Dump", "instruments.Log", "program.Program"}
"""Instruments take notes, a group of nodes and an integer program grow."""


def frozen(path: Path) -> dict[str, bool]:
    """The dataclasses of a file, and whether each is frozen."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        for how in getattr(node, "decorator_list", ()):
            if "dataclass" in ast.dump(how):
                options = how.keywords if isinstance(how, ast.Call) else ()
                is_frozen = any(o.arg == "frozen" and ast.literal_eval(o.value) for o in options)
                found[f"{path.stem}.{node.name}"] = is_frozen
    return found


def test_passes_and_what_they_work_with_are_frozen():
    classes = {name: is_frozen for path in PATH.parent.rglob("*.py") for name, is_frozen in frozen(path).items()}
    assert len(classes) > 30
    assert {name for name, is_frozen in classes.items() if not is_frozen} == LOOSE
