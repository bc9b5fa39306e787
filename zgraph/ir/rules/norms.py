"""Rules of layer norms: rows pass, what is normalised is whole."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, letters, written


def layer_norm(call: Call) -> Rule | None:
    """A layer norm, with the mean and the deviation of each row; None without weight or bias."""
    if len(call.ins) != 3:
        return None
    rows, tail, stat = _parts(call, 1)
    return written(call, f"{rows} {tail}, {tail}, {tail} -> {rows} {tail}, {stat}, {stat}")


def backward(call: Call) -> Rule | None:
    """Its backward, in which gradients of weight and bias are sums over rows; None without these."""
    if len(call.ins) != 6 or None in call.outs:
        return None
    rows, tail, stat = _parts(call, 2)
    text = f"{rows} {tail}, {rows} {tail}, {stat}, {stat}, {tail}, {tail} -> {rows} {tail}, {tail}, {tail}"
    return written(call, text, linear=((0,),))


def _parts(call: Call, position: int) -> tuple[str, str, str]:
    """The factors of rows, of what is normalised, and of statistics of rows."""
    own, count = call.shape(0), len(call.integers(position, "normalized_shape"))
    rows = " ".join(letters(own)[: len(own) - count])
    return rows, " ".join(f"_h{i}" for i in range(count)), f"{rows} " + " ".join(f"_one{i}" for i in range(count))


RULES = {
    "aten.native_layer_norm.default": layer_norm,
    "aten.native_layer_norm_backward.default": backward,
}
