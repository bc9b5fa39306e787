"""Memory that ops take and give back while they run, where it is not negligible.

Read off what torch 2.13's allocator is asked for by its attention on processors (`cpu_flash_attention` and its
backward): queries go in pieces of 32, 64 or 256, keys in pieces of 512, with one buffer a thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir import Node, TensorType
from zgraph.ir.symbols import evaluate

NUM_THREADS = "num_threads"
"""A hint of this name says how many threads the kernels of a processor use; 1 where there is none."""

_FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"
_KEY_PIECE = 512
_ACCUMULATED_BYTES = 4


def workspace_bytes(node: Node, hints: Mapping[str, int]) -> int:
    """Bytes that a node's op takes beside its operands and results while it runs."""
    packet = ".".join(node.op.split(".")[:2])
    if packet not in (_FORWARD, _BACKWARD):
        return 0
    kinds = [v.tensor for v in node.operands if isinstance(v.type, TensorType)]
    threads = hints.get(NUM_THREADS, 1)
    if packet == _FORWARD:
        _, _, num_queries, size = _sizes(kinds[0], hints)
        queries, keys = _pieces(num_queries, _sizes(kinds[1], hints)[2])
        return threads * queries * (keys + size + 2) * _ACCUMULATED_BYTES
    gradient = kinds[0]
    batch, heads, num_queries, size = _sizes(gradient, hints)
    queries, keys = _pieces(num_queries, _sizes(kinds[2], hints)[2])
    found = (threads * 2 * queries * keys + queries) * _ACCUMULATED_BYTES
    tokens_first = (num_queries * heads * size, size, heads * size, 1)
    strides = None if gradient.strides is None else tuple(evaluate(s, hints) for s in gradient.strides)
    if strides != tokens_first:  # it is copied into the layout that the kernel reads
        found += batch * heads * num_queries * size * gradient.dtype.itemsize
    return found


def _sizes(kind: TensorType, hints: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(d, hints) for d in kind.shape)


def _pieces(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Queries and keys that one thread works on at a time."""
    piece = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(piece, num_queries), min(_KEY_PIECE, num_keys)
