"""Scratch memory of ops on processors, measured: each op that differs runs once on made-up operands.

Only ATen's ops are run: what an op of another library does beside computing, nobody knows. Their memory, and that of
zgraph's own kernels, is said by rules (`zgraph.cost.workspace`), as is that of ops which are too large, or which
do not take made-up operands.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.bridge.private_allocator import in_own_thread, requested_bytes
from zgraph.bridge.private_onednn import as_outside
from zgraph.cost.memory import ALLOCATION_BYTES, local_bytes
from zgraph.cost.work import work
from zgraph.cost.workspace import NUM_THREADS, by_rule, is_measured, kept_hint, measured_hint, scratch_key
from zgraph.errors import ZgraphError
from zgraph.ir import Graph, Node, ScalarType, TensorType, Value
from zgraph.ir.graph import graphs_in
from zgraph.ir.layout import dense_strides
from zgraph.ir.ops import views
from zgraph.ir.symbols import evaluate

MAX_BYTES = 1 << 30
"""Of the operands and results of an op that is run."""

MAX_FLOP = 1e11
"""Of an op that is run: a second or two of a core."""

MAX_GRAPH_FLOP = 2e11
MAX_GRAPH_S = 2.0
"""Of all runs for one graph: rules tell what the other ops take, those that go above it and those that come later."""

NUM_RUNS = 2
"""Of an op, as the first may set up what later ones find."""

Hints = Mapping[str, int]

_CPU = torch.device("cpu")
_Place = tuple[int, bool, str]
_known: dict[_Place, tuple[int, int] | None] = {}
"""By threads, whether oneDNN is taken, and key: what `_taken` found."""


def measured_scratch(graph: Graph, hints: Hints) -> dict[str, int]:
    """Hints that tell what the ops of a graph take for themselves while they run on this processor, in bytes.

    An op is run once in a process for each kind of operands. Torch's random numbers are as they were. How far the time
    goes differs from rank to rank: ranks that plan together take what one of them has found. Rules hold where there is
    no hint, so for all ops where torch has another number of threads than the hints.

    Args:
        graph: local types, as one rank has them, or those before it is sharded.
        hints: a number for each symbolic size, and of threads.
    """
    if torch.get_num_threads() != hints[NUM_THREADS]:
        return {}
    wanted = _within_limit(graph, hints)
    with as_outside() as has_onednn:
        places = {key: (hints[NUM_THREADS], has_onednn, key) for key in wanted}
        if missing := {place: wanted[key] for key, place in places.items() if place not in _known}:
            in_own_thread(lambda: _measure(missing, hints))
    told: dict[str, int] = {}
    for key, node in wanted.items():
        if (found := _known.get(places[key])) is not None:
            taken, kept = found
            if abs(taken - by_rule(node, hints)) >= ALLOCATION_BYTES:
                told |= {measured_hint(node.op): 1, measured_hint(key): taken}
            if kept >= ALLOCATION_BYTES:
                told |= {kept_hint(node.op): 1, kept_hint(key): kept}
    return told


def known_scratch(hints: Hints) -> dict[str, int]:
    """Those of the hints that tell what was measured."""
    return {name: int(size) for name, size in hints.items() if is_measured(name)}


def _within_limit(graph: Graph, hints: Hints) -> dict[str, Node]:
    """Nodes that are run for a graph, by key. Which ones does not depend on what has been measured before."""
    found: dict[str, Node] = {}
    left = MAX_GRAPH_FLOP
    for node, flop in _runnable(graph, hints):
        key = scratch_key(node, hints)
        if key not in found and NUM_RUNS * flop <= left:
            left -= NUM_RUNS * flop
            found[key] = node
    return found


def _measure(missing: Mapping[_Place, Node], hints: Hints) -> None:
    """Run ops one by one until the time of this thread is over."""
    began = time.thread_time()
    for place, node in missing.items():
        if time.thread_time() - began >= MAX_GRAPH_S:
            break
        try:
            _known[place] = _taken(node, hints)
        except MemoryError:
            warnings.warn(
                f"there was no memory to run {node.op} once and measure what it takes: a rule says it instead, on all "
                "ranks that plan with this one",
                stacklevel=2,
            )


def _runnable(graph: Graph, hints: Hints) -> Iterator[tuple[Node, float]]:
    """Nodes of a graph, and of the functions that it calls, whose ops can be run and may take memory; their FLOP."""
    for node in graph.nodes:
        for called in graphs_in(node.args):
            yield from _runnable(called, hints)
        if node.op.startswith("aten.") and not views(graph, node) and _is_known(node, hints) and _takes(node):
            kinds = [v.type for v in (*node.operands, *node.results)]
            size = sum(local_bytes(kind, (), hints) for kind in kinds)
            flop = evaluate(work(graph, node).flop, hints)
            if size <= MAX_BYTES and flop <= MAX_FLOP:
                yield node, flop


def _is_known(node: Node, hints: Hints) -> bool:
    """Whether all sizes of a node are numbers."""
    for value in (*node.operands, *node.results):
        kind = value.type
        if isinstance(kind, ScalarType) and kind.expr is None:
            return False
        dims: tuple[Any, ...] = (*kind.shape, *(kind.strides or ())) if isinstance(kind, TensorType) else ()
        dims = (kind.expr,) if isinstance(kind, ScalarType) else dims
        if any(str(s) not in hints for dim in dims for s in getattr(dim, "free_symbols", ())):
            return False
    return True


def _takes(node: Node) -> bool:
    """Whether an op may take memory: one that goes through its operands by elements does only to convert them."""
    if torch.Tag.pointwise not in getattr(resolve(node.op), "tags", ()):
        return True
    given = {v.tensor.dtype for v in node.operands if isinstance(v.type, TensorType)}
    return len(given) > 1 or not all(TO_TORCH[dtype].is_floating_point for dtype in given)


def _taken(node: Node, hints: Hints) -> tuple[int, int] | None:
    """Bytes that an op takes beside its operands and results, and that its results keep beyond what their types say;
    None if it does not run on what is made up. MemoryError if there was no room for it."""
    made: dict[str, Any] = {}

    def of(value: Value) -> Any:
        if value.name not in made:
            made[value.name] = _made(value, hints)
        return made[value.name]

    def run() -> Any:
        found = op(*args, **kwargs)
        own.append(_own_bytes(node, found, made, hints))
        return found

    own: list[int] = []
    with torch.random.fork_rng([]):
        try:
            op: Any = resolve(node.op)
            args = [to_torch(a, _CPU, of) for a in node.args]
            kwargs = {key: to_torch(a, _CPU, of) for key, a in node.kwargs}
            runs = [requested_bytes(run) for _ in range(NUM_RUNS)]
        except ZgraphError:
            raise
        except Exception as error:  # whatever an op says of numbers that mean nothing to it
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise MemoryError(str(error)) from None
            return None
    most, held = (max(column) for column in zip(*runs, strict=True))
    stated = min(own)
    kept = max(held - stated, 0)
    return max(most - stated - kept, 0), kept


def _own_bytes(node: Node, found: Any, made: Mapping[str, Any], hints: Hints) -> int:
    """Bytes, by their types, of the results with storage of their own: one may be an operand, or share with another."""
    results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    stated = [v for v in node.results if isinstance(v.type, TensorType)]
    if len(results) != len(stated):
        return sum(local_bytes(v.type, (), hints) for v in stated)
    seen = {t.untyped_storage().data_ptr() for t in made.values() if isinstance(t, torch.Tensor)}
    num_bytes = 0
    for value, tensor in zip(stated, results, strict=True):
        at = tensor.untyped_storage().data_ptr()
        num_bytes += 0 if at in seen else local_bytes(value.type, (), hints)
        seen.add(at)
    return num_bytes


def _made(value: Value, hints: Hints) -> Any:
    """Zeros, which are valid as indices too, laid out as the type says."""
    kind = value.type
    if isinstance(kind, ScalarType):
        number = evaluate(kind.expr, hints) if kind.expr is not None else 0
        return {"int": int, "float": float, "bool": bool}[kind.kind](number)
    if not isinstance(kind, TensorType):
        return None
    shape = [evaluate(d, hints) for d in kind.shape]
    strides = [evaluate(d, hints) for d in kind.strides or dense_strides(kind.shape)]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    return torch.zeros(extent, dtype=TO_TORCH[kind.dtype]).as_strided(shape, strides)
