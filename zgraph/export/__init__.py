"""Graphs and predicted steps in the formats of other tools' viewers, as pieces of text: nothing is held as a whole."""

from zgraph.export.dot import dot
from zgraph.export.model_explorer import model_explorer
from zgraph.export.perfetto import perfetto

__all__ = ["dot", "model_explorer", "perfetto"]
