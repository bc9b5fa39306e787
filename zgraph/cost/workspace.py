"""Memory that ops take and give back while they run on processors, where it is not negligible.

Where it was measured (`zgraph.bridge.scratch`), hints tell it. The rules here are for ops that were not, read off what
torch 2.13's allocator is asked for. Attention works on 32, 64 or 256 queries by 512 keys at a time, with one buffer a
thread (`cpu_flash_attention` and its backward); dropout and softmax are made of several steps there; convolutions bring
what they read into their own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from zgraph.cost.device_workspace import device_workspace_bytes
from zgraph.cost.functions import called_bytes, is_higher_order
from zgraph.ir import Arg, Graph, Node, ScalarType, TensorType, Type, Value, print_graph
from zgraph.ir.codecs import CODED_AT_A_TIME, Difference, Sized
from zgraph.ir.coded_rules import codec_of
from zgraph.ir.external_ops import Scratch, facts
from zgraph.ir.symbols import evaluate

NUM_THREADS = "num_threads"
"""A hint of this name is there where kernels run on processors, and says how many threads they use."""

_MEASURED, _KEPT = "scratch of ", "scratch kept by "
"""How hints begin that tell what was measured: of an op that it was, and of a `scratch_key` the bytes."""

_CODING_BYTES = 32
"""For each number of a piece that is coded or decoded: in fp32, in steps, in blocks, and what it stands for."""

_KEY_PIECE = 512
_FLOAT_BYTES = 4
_FEW_BYTES = 512
"""Scalars and rows that come along."""

Hints = Mapping[str, int]

REGISTERED: dict[str, Callable[[Node, Hints], int]] = {}
"""Rules for the workspace of custom ops on processors, in bytes, by `namespace.name`. Whoever brings an op adds one."""

Kinds = Sequence[TensorType]


def workspace_bytes(node: Node, hints: Hints) -> int:
    """Bytes that a node's op takes beside its operands and results while it runs, on processors or on a GPU."""
    if is_higher_order(node):
        return called_bytes(node, lambda kind: _type_bytes(kind, hints), lambda inner: workspace_bytes(inner, hints))
    if node.op in ("encode", "decode"):
        numbers = node.operands[0] if node.op == "encode" else node.results[0]
        codec = codec_of(node)
        listed = _type_bytes(node.operands[0].type, hints) if isinstance(codec, Sized) else 0
        if isinstance(codec, Difference):  # of a part, of which there are two or more: three times in fp32
            listed += 3 * _FLOAT_BYTES * evaluate(numbers.tensor.numel, hints) // 2
        return listed + _CODING_BYTES * min(evaluate(numbers.tensor.numel, hints), CODED_AT_A_TIME)
    if NUM_THREADS not in hints:
        return device_workspace_bytes(node, hints)
    if measured_hint(node.op) in hints:
        measured = hints.get(measured_hint(scratch_key(node, hints)))
        return by_rule(node, hints) if measured is None else measured
    return by_rule(node, hints)


def by_rule(node: Node, hints: Hints) -> int:
    """The same of an op on processors that was not measured."""
    packet = ".".join(node.op.split(".")[:2])
    if packet in REGISTERED:
        return REGISTERED[packet](node, hints)
    rule = facts(node.op).scratch
    return _RULES[rule]([v.type for v in node.operands if isinstance(v.type, TensorType)], hints) if rule else 0


def measured_hint(of: str) -> str:
    """Name of the hint that tells what an op, or one with a `scratch_key`, took when it was measured."""
    return f"{_MEASURED}{of}"


def kept_hint(of: str) -> str:
    """Name of the hint that tells what the results of an op, or of one with a `scratch_key`, keep for themselves."""
    return f"{_KEPT}{of}"


def is_measured(hint: str) -> bool:
    """Whether a hint tells what was measured, and not the size of something."""
    return hint.startswith((_MEASURED, _KEPT))


def kept_bytes(node: Node, hints: Hints) -> int:
    """Bytes that the results of a node keep beyond what their types say, as long as they live: a loss is a number in
    the memory of all that it is the mean of."""
    return hints.get(kept_hint(scratch_key(node, hints)), 0) if kept_hint(node.op) in hints else 0


def scratch_key(node: Node, hints: Hints) -> str:
    """Text that is the same for two nodes only if they take the same memory: the op, and its arguments with sizes as
    numbers and values as their types, numbered as they first come."""
    numbers: dict[str, int] = {}
    args = [_argument(arg, hints, numbers) for arg in node.args]
    args += [f"{key}={_argument(arg, hints, numbers)}" for key, arg in node.kwargs]
    return f"{node.op}({', '.join(args)})"


def _argument(arg: Arg, hints: Hints, numbers: dict[str, int]) -> str:
    match arg:
        case Value():
            number = numbers.setdefault(arg.name, len(numbers))
            return f"%{number}: {_kind(arg.type, hints)}"
        case Graph():
            return print_graph(arg, origins=False)
        case tuple():
            return f"[{', '.join(_argument(a, hints, numbers) for a in arg)}]"
    return repr(arg)


def _kind(kind: Type, hints: Hints) -> str:
    if isinstance(kind, ScalarType):
        return f"{kind.kind} {'?' if kind.expr is None else evaluate(kind.expr, hints)}"
    if not isinstance(kind, TensorType):
        return str(kind)
    shape = "x".join(str(evaluate(d, hints)) for d in kind.shape)
    strides = "" if kind.strides is None else "|" + "x".join(str(evaluate(d, hints)) for d in kind.strides)
    return f"{kind.dtype.value}[{shape}{strides}]"


def _type_bytes(kind: Type, hints: Hints) -> int:
    return _bytes(kind, hints) if isinstance(kind, TensorType) else 0


def _attention(kinds: Kinds, hints: Hints) -> int:
    query, key = kinds[:2]
    queries, keys = _pieces(query, key, hints)
    return hints[NUM_THREADS] * queries * (keys + evaluate(query.shape[3], hints) + 2) * _FLOAT_BYTES


def _attention_backward(kinds: Kinds, hints: Hints) -> int:
    gradient, _, key = kinds[:3]
    queries, keys = _pieces(gradient, key, hints)
    buffers = (hints[NUM_THREADS] * 2 * queries * keys + queries) * _FLOAT_BYTES
    _, heads, num_queries, size = (evaluate(d, hints) for d in gradient.shape)
    tokens_first = (num_queries * heads * size, size, heads * size, 1)
    strides = None if gradient.strides is None else tuple(evaluate(s, hints) for s in gradient.strides)
    return buffers + (0 if strides == tokens_first else _bytes(gradient, hints))


def _pieces(query: TensorType, key: TensorType, hints: Hints) -> tuple[int, int]:
    """Queries and keys that one thread works on at a time."""
    num_queries, num_keys = evaluate(query.shape[2], hints), evaluate(key.shape[2], hints)
    piece = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(piece, num_queries), min(_KEY_PIECE, num_keys)


def _first(kinds: Kinds, hints: Hints) -> int:
    """A tensor like the first operand."""
    return _bytes(kinds[0], hints) + _FEW_BYTES


def _softmax(kinds: Kinds, hints: Hints) -> int:
    """Which rows are all masked."""
    return _bytes(kinds[0], hints) // kinds[0].dtype.itemsize + _FEW_BYTES


def _strided(kinds: Kinds, hints: Hints) -> int:
    """A dense copy of the first operand if it is not dense."""
    return _bytes(kinds[0], hints) if kinds[0].strides is not None else 0


def _convolution(kinds: Kinds, hints: Hints) -> int:
    """The input, or the weight, in another layout."""
    return max(_bytes(kind, hints) for kind in kinds[:2])


def _convolution_backward(kinds: Kinds, hints: Hints) -> int:
    """The gradient, and the input or the weight, in another layout."""
    return _bytes(kinds[0], hints) + max(_bytes(kind, hints) for kind in kinds[1:3]) + _FEW_BYTES


def _bytes(kind: TensorType, hints: Hints) -> int:
    return evaluate(kind.numel, hints) * kind.dtype.itemsize


_RULES: Mapping[Scratch, Callable[[Kinds, Hints], int]] = {
    "attention": _attention,
    "attention backward": _attention_backward,
    "like the first": _first,
    "mask of the first": _softmax,
    "dense first": _strided,
    "convolution": _convolution,
    "convolution backward": _convolution_backward,
}
