"""The house is as its plan says: the table of rooms, no import circle, files that fit on a few screens."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import networkx as nx
import pytest

from tests.house.rooms import PAGE, ROOT, about, layers, written

FOLDERS = ("zgraph", "passes", "codegen", "runtime")
MOST_LINES, MEDIAN_LINES = 420, 120


def sources() -> dict[str, Path]:
    """Each module of the package and its file."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "zgraph" and len(parts) > 2 and parts[1] in FOLDERS:
                continue
            name = ".".join(parts if folder == "zgraph" else ("zgraph", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(tree: ast.AST) -> set[str]:
    """Imports of a module, for types and late imports included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_table_is_up_to_date():
    page = PAGE.read_text()
    assert written(page) == page, "run: python -m tests.house.rooms"


def test_every_room_says_what_it_holds():
    assert all(about(room).endswith(".") for rooms in layers() for room in rooms)


def test_no_import_circle():
    """Packages are left out where a module of theirs is meant."""
    files = sources()
    graph = nx.DiGraph()
    for name, path in files.items():
        there = imports(ast.parse(path.read_text())) & files.keys() - {name}
        graph.add_edges_from((name, other) for other in there if not any(o.startswith(f"{other}.") for o in there))
    assert graph.number_of_edges() > 500
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


def test_one_room_imports_private_modules_of_torch():
    private = {
        (name, module)
        for name, path in sources().items()
        if not name.startswith("zgraph.bridge.")
        for module in imports(ast.parse(path.read_text()))
        if module.startswith("torch._")
    }
    assert private == set()


def strings(tree: ast.AST) -> Iterator[str]:
    """Strings that are statements: what is said of modules, classes, functions and names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def test_docstrings_begin_with_a_verb_or_a_noun():
    paths = [*sources().values(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    found = [text for path in paths for text in strings(ast.parse(path.read_text()))]
    assert len(found) > 2000
    assert [text for text in found if text.startswith("What")] == []


def test_files_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in sources().items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
    assert median(lines.values()) <= MEDIAN_LINES


@pytest.mark.parametrize("folder", ["passes", "codegen", "runtime"])
def test_the_folders_at_the_top_are_linked_into_the_package(folder):
    link = ROOT / "zgraph" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
