"""The names that a graph's text may hold of the host framework's ops, devices and formats: closed lists, no lookups.

An op of a framework is `NAMESPACE.op.overload`. Functions on sizes have no overloads: `py.add`, `math.floor`,
`torch.sym_max`. Whatever is in none of these lists is refused when a text is read, before anything looks it up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zgraph.errors import UsageError, did_you_mean
from zgraph.ir.external_ops import facts


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SCALAR_FUNCTIONS: Mapping[str, frozenset[str]] = {
    "py": _words(
        "abs add and_ eq floordiv ge gt invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub truediv xor"
    ),
    "math": _words(
        "acos asin atan atan2 ceil copysign cos cosh exp fabs floor isfinite isinf isnan log log10 log1p log2 pow "
        "sin sinh sqrt tan tanh trunc"
    ),
    "torch": _words(
        "_sym_acos _sym_asin _sym_atan _sym_cos _sym_cosh _sym_log2 _sym_sin _sym_sinh _sym_sqrt _sym_tan "
        "_sym_tanh sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum"
    ),
}
"""Functions on numbers that graphs with symbolic sizes call, by the module that has them."""

HIGHER_ORDER = "higher_order"
"""The namespace of ops that call functions, which are graphs among their arguments."""

HIGHER_ORDER_OPS = _words(
    "associative_scan cond flex_attention flex_attention_backward map_impl scan while_loop while_loop_stack_output"
)

COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor", "c10d", "c10d_functional", "symm_mem")
"""Namespaces of ops between ranks."""

TOKENS: Mapping[str, frozenset[str]] = {
    "device": _words("cpu cuda hip hpu maia meta mps mtia xla xpu"),
    "layout": _words("strided sparse_coo"),
    "memory_format": _words("contiguous_format preserve_format channels_last channels_last_3d"),
}
"""The constants of the host framework that a text may name, by kind."""

BUILT_IN = ("aten", "flex_lib", "prims", "zgraph")
"""The libraries of torch and of zgraph; the second is what gradients of flex_attention's functions call."""

_namespaces = set(BUILT_IN)
_IDENTIFIER = re.compile(r"(?:[A-Za-z]|_(?!_))\w*|__i?(?:and|or|xor|lshift|rshift)__", re.ASCII)


def allow_namespace(name: str) -> None:
    """Let texts that this process reads name the ops of a library, `mylib` for `mylib.op.default`.

    Whoever captures a model with such ops need not call it. The ops that a file names can then be run.

    Raises:
        UsageError: it is no name of a namespace.
    """
    if not _IDENTIFIER.fullmatch(name) or name in (*SCALAR_FUNCTIONS, HIGHER_ORDER):
        raise UsageError(f"{name[:60]!r} is no namespace of ops; give the part before the first dot of an op's name")
    _namespaces.add(name)


def known_namespaces() -> frozenset[str]:
    """Those whose ops texts may name in this process."""
    return frozenset(_namespaces)


def refusal(op: str) -> str:
    """Reason to refuse the name of an op that is not zgraph's own, and what would be right; empty if it is accepted."""
    namespace, *rest = op.split(".")
    shown = op if len(op) <= 60 else op[:57] + "..."
    if namespace in SCALAR_FUNCTIONS:
        known = SCALAR_FUNCTIONS[namespace]
        if len(rest) == 1 and rest[0] in known:
            return ""
        hint = did_you_mean(".".join(rest)[:60], known, f"{namespace} has {_list(known)}")
        return f"{shown} is no function on sizes; {hint}"
    if namespace == HIGHER_ORDER:
        if rest in ([op, "default"] for op in HIGHER_ORDER_OPS):
            return ""
        return f"{shown} is no higher-order op of a graph; there are {_list(HIGHER_ORDER_OPS)}, each .default"
    if len(rest) != 2 or not all(_IDENTIFIER.fullmatch(part) for part in rest) or not _IDENTIFIER.fullmatch(namespace):
        return f"{shown} is no op; an op is NAMESPACE.name.overload, such as aten.add.Tensor"
    if namespace not in _namespaces:
        return (
            f"{shown} is an op of {namespace[:60]}, which this process does not know; the namespaces are "
            f"{_list(_namespaces)}, and zgraph.ir.allow_namespace adds one that is trusted"
        )
    if facts(op).opens_files:
        return f"{shown} opens files, which no graph may; load the data outside of the model"
    return ""


def token_refusal(kind: str, name: str) -> str:
    """Reason to refuse a constant of the host framework, and what would be right; empty if it is accepted."""
    if kind not in TOKENS:
        return f"{kind[:60]} is no kind of constant; the kinds are {_list(TOKENS)}"
    if name not in TOKENS[kind]:
        return f"{name[:60]!r} is no {kind.replace('_', ' ')}; there are {_list(TOKENS[kind])}"
    return ""


def _list(names: frozenset[str] | set[str] | Mapping[str, object]) -> str:
    return ", ".join(sorted(names))
