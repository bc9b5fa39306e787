"""Memory that ops take and give back while they run on GPUs, where it is not negligible.

Read off torch 2.13's sources: flash attention's backward (`flash_api.cpp`) adds up the gradient of queries in fp32, as
the efficient (`kernel_backward.h`) and cuDNN's do; the gradient of an embedding (`EmbeddingBackwardKernel.cu`) is added
up in fp32, one row for each index, behind a sort of the indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from zgraph.ir import Node, TensorType
from zgraph.ir.external_ops import DeviceScratch, facts
from zgraph.ir.symbols import evaluate

Hints = Mapping[str, int]

REGISTERED: dict[str, Callable[[Node, Hints], int]] = {}
"""Rules for the workspace of custom ops on GPUs, in bytes, by `namespace.name`. Whoever brings an op adds one."""

_FLOAT_BYTES, _INDEX_BYTES = 4, 8

ROUNDED_TOKENS, ROUNDED_SIZE, WHOLE_SIZE = 128, 32, 256
"""Queries, and numbers of a head, are rounded up to multiples of these; heads of more than 192 numbers to the last."""

FEW_INDICES = 3072
"""An embedding's gradient for so few indices is added up in place."""

SORT_BUFFERS = 8
"""Lists of all indices: in their order, sorted, where each was, where segments begin, what the sort itself takes."""


def device_workspace_bytes(node: Node, hints: Hints) -> int:
    """Bytes that a node's op takes on a GPU, beside its operands and results, while it runs."""
    packet = ".".join(node.op.split(".")[:2])
    if packet in REGISTERED:
        return REGISTERED[packet](node, hints)
    rule = facts(node.op).device_scratch
    return _RULES[rule](node, hints) if rule else 0


def _shapes(node: Node, hints: Hints) -> list[tuple[int, ...]]:
    kinds = (v.type for v in node.operands if isinstance(v.type, TensorType))
    return [tuple(evaluate(d, hints) for d in kind.shape) for kind in kinds]


def _attention_backward(node: Node, hints: Hints) -> int:
    """Operands: the gradient, query and key, each [batch, heads, tokens, size]."""
    _, (batch, heads, tokens, size), key, *_ = _shapes(node, hints)
    return _gradient_of_queries(batch, heads, tokens, size, key[1], key[2], node.operands[1].tensor.dtype.itemsize)


def _attention_by_tokens_backward(node: Node, hints: Hints) -> int:
    """The same of [batch, tokens, heads, size], or [tokens, heads, size] of all sequences together."""
    _, query, key, *_ = _shapes(node, hints)
    batch, tokens, heads, size = query if len(query) == 4 else (1, *query)
    return _gradient_of_queries(batch, heads, tokens, size, key[-2], key[-3], node.operands[1].tensor.dtype.itemsize)


def _gradient_of_queries(
    batch: int, heads: int, tokens: int, size: int, key_heads: int, num_keys: int, itemsize: int
) -> int:
    """Sums in fp32 of the gradient, and one for each row; keys and values for each head, where heads share them."""
    rounded = -(-tokens // ROUNDED_TOKENS) * ROUNDED_TOKENS
    numbers = -(-size // ROUNDED_SIZE) * ROUNDED_SIZE if size <= 192 else max(WHOLE_SIZE, size)
    shared = 2 * batch * heads * num_keys * size * itemsize if key_heads != heads else 0
    return batch * heads * rounded * (numbers + 1) * _FLOAT_BYTES + shared


def _embedding_backward(node: Node, hints: Hints) -> int:
    """Operands: the gradient [*, D], and as many indices as it has rows."""
    gradient, indices, *_ = _shapes(node, hints)
    count = math.prod(indices)
    if count <= FEW_INDICES:
        return 0
    sums = max(_FLOAT_BYTES, node.operands[0].tensor.dtype.itemsize) * count * gradient[-1]
    return sums + SORT_BUFFERS * _INDEX_BYTES * count


def _sorted_rows(node: Node, hints: Hints) -> int:
    """Of what adds to rows: the sort of the indices, for each number of an index that is broadcast over others."""
    if True not in node.args:
        return 0
    indices = [v.tensor for v in node.operands[1:-1]]
    count = max((evaluate(kind.numel, hints) for kind in indices), default=0)
    return SORT_BUFFERS * _INDEX_BYTES * count


_RULES: Mapping[DeviceScratch, Callable[[Node, Hints], int]] = {
    "attention backward": _attention_backward,
    "attention by tokens backward": _attention_by_tokens_backward,
    "embedding backward": _embedding_backward,
    "sorted rows": _sorted_rows,
}
