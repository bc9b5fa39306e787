"""Printing to a terminal: texts from files as text only, whatever commands to the terminal they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""A text with what is none, or turns its direction, written as an escape; tabs and ends of lines stay.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Terminal(Console):
    """A console whose only commands to the terminal are its own: colours, and those of the progress line."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of something to print, each printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
