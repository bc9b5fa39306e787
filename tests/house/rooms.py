"""Writes the table of rooms in docs/architecture.md from import-linter's layers: `python -m tests.house.rooms`."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms -->\n", "<!-- end of rooms -->\n"
AT_THE_TOP = ("passes", "codegen", "runtime")


def layers() -> list[list[str]]:
    """The rooms of each layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [layer.split(" | ") for layer in contracts[0]["layers"]]


def place(room: str) -> str:
    if room in AT_THE_TOP:
        return f"`{room}` (as `zgraph.{room}`)"
    return f"`zgraph/{room}`" if (ROOT / "zgraph" / room).is_dir() else f"`zgraph/{room}.py`"


def about(room: str) -> str:
    """The first line of a room's docstring."""
    folder = ROOT / "zgraph" / room
    source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(source.read_text())) or "").splitlines()[0]


def table() -> str:
    rows = ["| layer | room | what it holds |", "|---|---|---|"]
    for number, rooms in enumerate(reversed(layers())):
        rows += [f"| {number} | {place(room)} | {about(room)} |" for room in rooms]
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """A page with the table in its place."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
