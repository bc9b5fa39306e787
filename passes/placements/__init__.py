"""Search of where things live along a model axis: an integer program over the placements of parameters and values."""

from __future__ import annotations

from zgraph.passes.placements.search import Alternative, Found, Search

__all__ = ["Alternative", "Found", "Search"]
