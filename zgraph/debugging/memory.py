"""Memory that a check needs, so that one that does not fit is refused before it begins."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.debugging.dtypes import in_dtype
from zgraph.debugging.numbers import SIZE
from zgraph.errors import BudgetError
from zgraph.ir import DType, Graph, TensorType
from zgraph.ir.aliases import Memory
from zgraph.ir.layout import chunk_numel
from zgraph.ir.symbols import evaluate
from zgraph.ir.types import Type
from zgraph.passes.core.pipeline import print_size
from zgraph.runtime.host import available_bytes


def peak_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """The most bytes that one simulated rank has alive at once, counting nothing that an op takes for itself."""
    memory, births = Memory(graph), dict[str, int]()
    for value in (*(i.value for i in graph.inputs), *(r for n in graph.nodes for r in n.results)):
        if value.name in memory.roots(value.name):
            births[value.name] = _num_bytes(value.type, graph, sizes)
    last, kept = memory.last_uses(), memory.returned() | {i.value.name for i in graph.inputs}
    deaths: dict[int, list[str]] = {}
    for name in births:
        if name not in kept:
            deaths.setdefault(last[name], []).append(name)
    alive = most = sum(births[i.value.name] for i in graph.inputs)
    for position, node in enumerate(graph.nodes):
        alive += sum(births.get(r.name, 0) for r in node.results)
        most = max(most, alive)
        alive -= sum(births[name] for name in deaths.get(position, ()))
    return most


def output_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of what a graph returns."""
    return sum(_num_bytes(o.value.type, graph, sizes) for o in graph.outputs if o.value is not None)


def check_memory(
    graph: Graph, num_ranks: int, sizes: Mapping[str, int], dtype: DType, max_bytes: int | None, num_runs: int = 1
) -> None:
    """Refuse a check that takes more memory than it may.

    Args:
        graph: that all others are compared with.
        num_ranks: how many are simulated.
        sizes: of symbols.
        dtype: of all floating-point numbers.
        max_bytes: by default half of what is free.
        num_runs: of how many runs of the graph the outputs are kept.

    Raises:
        BudgetError: it does not fit.
    """
    count, run = graph.num_ranks if graph.mesh else num_ranks, in_dtype(graph, dtype)
    needed = count * (2 * peak_bytes(run, sizes) + num_runs * output_bytes(run, sizes))  # inputs twice
    room = available_bytes() // 2 if max_bytes is None else max_bytes
    if needed > room:
        raise BudgetError(
            f"checking on {count} simulated ranks takes about {print_size(-(-needed // 2**20) * 2**20)} of memory, and "
            f"{print_size(room // 2**20 * 2**20)} may be used. Trace fewer layers, a smaller --batch or --seq; check "
            "on fewer ranks with --world; or allow more with --max-memory"
        )


def _num_bytes(kind: Type, graph: Graph, sizes: Mapping[str, int]) -> int:
    if not isinstance(kind, TensorType):
        return 0
    if kind.is_sharded:
        return chunk_numel(kind.shape, graph.num_shards) * kind.dtype.itemsize
    symbols = {str(s) for d in kind.shape if not isinstance(d, int) for s in d.free_symbols}
    return evaluate(kind.numel, {s: sizes.get(s, SIZE) for s in symbols}) * kind.dtype.itemsize
