"""Places in the source that wait for a stream, an event, a collective or a thread."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("runtime", "zgraph/optim", "zgraph/engine")
FILES = ("zgraph/bridge/private_runtime.py",)
WAITS = ("wait", "wait_stream", "wait_event", "synchronize", "settle", "after", "result")


def waits() -> dict[str, str]:
    """Each function that waits, as a log's site names it, and its file."""
    found = {}
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in [*paths, *(ROOT / file for file in FILES)]:
        for name in _in(ast.parse(path.read_text()), ""):
            found[name] = str(path.relative_to(ROOT))
    return found


def _in(tree: ast.AST, prefix: str) -> Iterator[str]:
    """Names of functions with a wait in their own lines."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef) and any(_is_wait(call) for call in _own(node)):
                yield name
            yield from _in(node, f"{name}.")
        else:
            yield from _in(node, prefix)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions within it."""
    ahead: list[ast.AST] = [*function.body]
    while ahead:
        node = ahead.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            ahead.extend(ast.iter_child_nodes(node))


def _is_wait(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS
