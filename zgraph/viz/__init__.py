"""Pictures of plans for the terminal."""

from zgraph.viz.curve import memory_chart
from zgraph.viz.text import as_text, gibibytes

__all__ = ["as_text", "gibibytes", "memory_chart"]
