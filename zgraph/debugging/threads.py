"""How many threads a check runs with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zgraph.ir import Graph, TensorType

SMALL = 1 << 16
"""Tensors of fewer numbers than this are small."""


@contextmanager
def suited(graph: Graph) -> Iterator[None]:
    """One thread for a graph all of whose tensors are small, where several would only wait for each other."""
    before = torch.get_num_threads()
    is_small = all(_numel(r.type) < SMALL for n in graph.nodes for r in n.results)
    if is_small and before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_small and before > 1:
            torch.set_num_threads(before)


def _numel(kind: object) -> int:
    """How many numbers a tensor has; 1 where that is not known."""
    if not isinstance(kind, TensorType):
        return 1
    numel = kind.numel
    return numel if isinstance(numel, int) else 1
