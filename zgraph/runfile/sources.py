"""The user's lines that a captured graph comes from, taken where it is captured and kept beside its graphs.

A graph that was read from a file names files too. Nothing opens those: whoever wrote the file chose the names.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from zgraph.errors import RunFileError
from zgraph.ir import Graph, Origin

Sources = Mapping[str, Mapping[int, str]]
"""Lines by file and number."""

CONTEXT_LINES = 3
"""Lines before and after the one that a node comes from."""

MAX_LINES = 20_000
MAX_CHARACTERS = 400
"""Of a line; what follows is cut off."""

MAX_BYTES = 16 << 20
"""Of the text that holds them."""

_TEXT = TypeAdapter(
    dict[str, dict[Annotated[int, Field(gt=0, lt=2**31)], Annotated[str, Field(max_length=MAX_CHARACTERS)]]]
)


def sources_of(captured: Graph) -> Sources:
    """The lines around those that a graph comes from, as far as they can be read; of a graph captured here, only."""
    found: dict[str, dict[int, str]] = {}
    num_lines = 0
    for origin in dict.fromkeys((node.origin.file, node.origin.line) for node in captured.nodes if node.origin.file):
        for file, number, text in _around(*origin):
            if num_lines < MAX_LINES and number not in (lines := found.setdefault(file, {})):
                lines[number] = text[:MAX_CHARACTERS]
                num_lines += 1
    return found


def print_sources(sources: Sources) -> bytes:
    """The text that `read_sources` reads back."""
    return _TEXT.dump_json({file: dict(lines) for file, lines in sources.items()}, indent=1)


def read_sources(text: bytes) -> Sources:
    """The lines that a text holds.

    Raises:
        RunFileError: it holds none, or too much.
    """
    if len(text) > MAX_BYTES:
        raise RunFileError(f"its source lines take more than {MAX_BYTES >> 20} MiB; write it again with zgraph trace")
    try:
        return _TEXT.validate_json(text)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise RunFileError(f"its source lines are damaged: {said}; write it again with zgraph trace") from None


def line_of(sources: Sources, origin: Origin) -> str:
    """The line that a node comes from; empty where it is not known."""
    return sources.get(origin.file, {}).get(origin.line, "").strip()


def context_of(sources: Sources, places: Iterable[tuple[str, int]]) -> dict[str, dict[int, list[str]]]:
    """The lines around each place that is known, by file and line."""
    found: dict[str, dict[int, list[str]]] = {}
    for file, line in dict.fromkeys(places):
        if line in (lines := sources.get(file, {})):
            found.setdefault(file, {})[line] = [
                lines.get(number, "") for number in range(line - CONTEXT_LINES, line + CONTEXT_LINES + 1)
            ]
    return found


def _around(file: str, line: int) -> Iterator[tuple[str, int, str]]:
    lines = linecache.getlines(file)
    for number in range(max(1, line - CONTEXT_LINES), min(len(lines), line + CONTEXT_LINES) + 1):
        yield file, number, lines[number - 1].rstrip("\n")
