"""Rules of fused attention: batch and heads pass; what is attended to, and the size of a head, are whole.

The scale of a product is that of a whole head, so a head's size is never cut. Rows of queries may be cut where no
causal mask counts them. Where several heads of queries share one of keys, they are cut with it. With dropout all is
whole: a rank would draw other numbers for its heads than for all.
"""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir.rules.factors import Call, Rule, Shape, written
from zgraph.ir.symbols import Dim


def mask(shape: Shape, q: str) -> str:
    """The factors of a mask, which is broadcast."""
    names = [("b", "_one_b"), ("(h g)", "_one_h"), (q, "_one_q"), ("_s", "_one_s")][4 - len(shape) :]
    return " ".join(name if size != 1 else one for (name, one), size in zip(names, shape, strict=True))


def groups(call: Call, queries: int, keys: int) -> Mapping[str, Dim] | None:
    """The sizes of heads of keys, and of queries that share one; None where they do not divide."""
    of_queries, of_keys = call.shape(queries)[1], call.shape(keys)[1]
    if not isinstance(of_queries, int) or not isinstance(of_keys, int) or of_queries % of_keys:
        return None
    return {"h": of_keys, "g": of_queries // of_keys}


def forward(call: Call) -> Rule | None:
    """Attention on processors, with its log of sums; None with dropout."""
    sizes = groups(call, 0, 1)
    if call.arg(3, "dropout_p", 0.0) or sizes is None:
        return None
    q = "_q" if call.arg(4, "is_causal", False) else "q"
    last = ", " + mask(call.shape(3), q) if len(call.ins) > 3 else ""
    text = f"b (h g) {q} _d, b h _s _d, b h _s _e{last} -> b (h g) {q} _e, b (h g) {q}"
    return written(call, text, sizes=sizes)


def backward(call: Call) -> Rule | None:
    """Its backward; None with dropout."""
    sizes = groups(call, 1, 2)
    if call.arg(6, "dropout_p", 0.0) or sizes is None:
        return None
    q = "_q" if call.arg(7, "is_causal", False) else "q"
    last = ", " + mask(call.shape(6), q) if len(call.ins) > 6 else ""
    queries, keys = f"b (h g) {q} _d, b h _s _d, b h _s _e", f"b (h g) {q} _e, b (h g) {q}"
    text = f"b (h g) {q} _e, {queries}, {keys}{last} -> {queries}"
    return written(call, text, sizes=sizes)


RULES = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": backward,
}
