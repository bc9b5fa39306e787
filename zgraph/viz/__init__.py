"""Pictures of runs: for the terminal, as one HTML file, and in the formats of other viewers."""

from zgraph.viz.curve import memory_chart
from zgraph.viz.text import as_text, gibibytes

__all__ = ["as_text", "gibibytes", "memory_chart"]
