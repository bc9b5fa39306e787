"""Pictures of plans for the terminal."""

from zgraph.viz.curve import memory_chart

__all__ = ["memory_chart"]
