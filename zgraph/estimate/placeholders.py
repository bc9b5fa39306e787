"""Graphs with placeholder sizes, and what they are with other sizes.

A model that is captured with sizes that are multiples of primes of their own can be read as one of any other sizes:
each prime that divides a number of the graph is replaced by what stands for it. A capture then serves many batches,
sequences and widths. Numbers that are sums of sizes are not recognised, so a model must have none that cost something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from zgraph.errors import UsageError
from zgraph.ir import Graph, TensorType, Type, Value
from zgraph.ir.graph import Arg

MAX_NUMBER = 1 << 52
"""Numbers from here on are no sizes: torch writes the end of an open slice as the largest of 64 bits."""


def with_sizes(graph: Graph, sizes: Mapping[int, int]) -> Graph:
    """The graph with other sizes.

    Args:
        graph: as captured, with whole numbers for sizes.
        sizes: for each prime, what takes its place.

    Raises:
        UsageError: a placeholder is no prime, or is 7 or less, which dims and options may be multiples of.
    """
    for prime in sizes:
        if prime <= 7 or any(prime % divisor == 0 for divisor in range(2, int(prime**0.5) + 1)):
            raise UsageError(f"a placeholder must be a prime above 7, not {prime}")
    return _Substitution(sizes).graph(graph)


class _Substitution:
    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.sizes = dict(sizes)
        self.number = lru_cache(maxsize=None)(self._number)
        self.type = lru_cache(maxsize=None)(self._type)

    def graph(self, graph: Graph) -> Graph:
        """The graph with its types and numbers substituted; names, phases and origins stay."""
        nodes = (
            replace(
                node,
                args=tuple(map(self.arg, node.args)),
                kwargs=tuple((key, self.arg(arg)) for key, arg in node.kwargs),
                results=tuple(map(self.value, node.results)),
            )
            for node in graph.nodes
        )
        return replace(
            graph,
            inputs=tuple(replace(entry, value=self.value(entry.value)) for entry in graph.inputs),
            nodes=tuple(nodes),
            outputs=tuple(
                replace(out, value=None if out.value is None else self.value(out.value)) for out in graph.outputs
            ),
        )

    def value(self, value: Value) -> Value:
        return Value(value.name, self.type(value.type))

    def arg(self, arg: Arg) -> Arg:
        if isinstance(arg, Value):
            return self.value(arg)
        if isinstance(arg, tuple):
            return tuple(map(self.arg, arg))
        if isinstance(arg, Graph):
            return self.graph(arg)
        return self.number(arg) if isinstance(arg, int) and not isinstance(arg, bool) else arg

    def _type(self, kind: Type) -> Type:
        if not isinstance(kind, TensorType):
            return kind
        strides = None if kind.strides is None else tuple(map(self.dim, kind.strides))
        return replace(kind, shape=tuple(map(self.dim, kind.shape)), strides=strides)

    def dim(self, dim: Any) -> Any:
        return self.number(dim) if isinstance(dim, int) else dim

    def _number(self, number: int) -> int:
        if abs(number) >= MAX_NUMBER or not number:
            return number
        found = 1
        for prime, size in self.sizes.items():
            while number % prime == 0:
                number, found = number // prime, found * size
        return number * found
