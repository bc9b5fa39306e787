"""The `zgraph` command: what the compiler does to a model, on any machine, without a GPU or a process group."""

from zgraph.cli.main import main

__all__ = ["main"]
