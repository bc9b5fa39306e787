"""Terminal output as a string."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType, *, width: int) -> str:
    """The text that rich would print, without colour, in lines of this width."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def gibibytes(num_bytes: int) -> str:
    """Bytes for people: in GiB, or in MiB below one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
