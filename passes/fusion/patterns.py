"""Each op of a transformer's glue as the steps of a kernel: data that the fusion pass matches.

A pattern says what the op is called with, what it makes, and the steps between; lines that begin with blanks go on.

    aten.silu_backward.default: g x -> y: s = sigmoid(x); ...

An argument is a name, bound to a value or a number, or says what must stand there: a number, `none`, `true`, `last`
(the last dimension alone), `rows` (all dimensions but the last), `_` for anything, or a keyword's argument as in
`approximate=tanh`. Arguments that are left out are at their defaults. In steps, `per_column` is one over the number of
columns, `per_kept` one over what a dropout with probability `p` keeps, and `seed` a number drawn once a step: where a
dropout keeps is a function of that and of the position, which is drawn again in the backward instead of kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from zgraph.codegen.spec import Step, parse_step

_LINES = """
aten._to_copy.default: x -> y: y = copy(x)
aten.clone.default: x -> y: y = copy(x)
aten.add.Tensor: a b -> y: y = add(a, b)
aten.add.Scalar: a b -> y: y = add(a, b)
aten.sub.Tensor: a b -> y: y = sub(a, b)
aten.mul.Tensor: a b -> y: y = mul(a, b)
aten.mul.Scalar: a b -> y: y = mul(a, b)
aten.div.Tensor: a b -> y: y = div(a, b)
aten.div.Scalar: a b -> y: y = div(a, b)
aten.neg.default: x -> y: y = neg(x)
aten.exp.default: x -> y: y = exp(x)
aten.log.default: x -> y: y = log(x)
aten.sqrt.default: x -> y: y = sqrt(x)
aten.rsqrt.default: x -> y: y = rsqrt(x)
aten.pow.Tensor_Scalar: x 1 -> y: y = copy(x)
aten.pow.Tensor_Scalar: x 2 -> y: y = mul(x, x)
aten.pow.Tensor_Scalar: x 3 -> y: s = mul(x, x); y = mul(s, x)
aten.relu.default: x -> y: y = maximum(x, 0.0)
aten.threshold_backward.default: g x 0 -> y: k = less(0.0, x); y = mul(g, k)
aten.sigmoid.default: x -> y: y = sigmoid(x)
aten.sigmoid_backward.default: g y0 -> y: o = sub(1.0, y0); d = mul(y0, o); y = mul(g, d)
aten.tanh.default: x -> y: y = tanh(x)
aten.tanh_backward.default: g y0 -> y: q = mul(y0, y0); d = sub(1.0, q); y = mul(g, d)
aten.silu.default: x -> y: s = sigmoid(x); y = mul(x, s)
aten.silu_backward.default: g x -> y:
    s = sigmoid(x); o = sub(1.0, s); xo = mul(x, o); k = add(xo, 1.0); d = mul(s, k); y = mul(g, d)
aten.gelu.default: x -> y: v = mul(x, 0.7071067811865476); f = erf(v); p = add(f, 1.0); h = mul(x, 0.5); y = mul(h, p)
aten.gelu_backward.default: g x -> y:
    v = mul(x, 0.7071067811865476); f = erf(v); p = add(f, 1.0); c = mul(p, 0.5); q = mul(v, v); n = neg(q);
    e = exp(n); k = mul(e, 0.3989422804014327); xk = mul(x, k); d = add(c, xk); y = mul(g, d)
aten.gelu.default: x approximate=tanh -> y:
    q = mul(x, x); c = mul(q, x); k = mul(c, 0.044715); z = add(x, k); v = mul(z, 0.7978845608028654); t = tanh(v);
    p = add(t, 1.0); h = mul(x, 0.5); y = mul(h, p)
aten.gelu_backward.default: g x approximate=tanh -> y:
    q = mul(x, x); c = mul(q, x); k = mul(c, 0.044715); z = add(x, k); v = mul(z, 0.7978845608028654); t = tanh(v);
    p = add(t, 1.0); h = mul(x, 0.5); tt = mul(t, t); o = sub(1.0, tt); ho = mul(h, o); q3 = mul(q, 0.134145);
    i = add(q3, 1.0); vi = mul(i, 0.7978845608028654); hv = mul(ho, vi); c2 = mul(p, 0.5); d = add(c2, hv);
    y = mul(g, d)
aten.native_dropout.default: x p true -> y k: u = random(seed); k = less(p, u); d = mul(x, k); y = mul(d, per_kept)
aten.native_dropout_backward.default: g kept scale -> y: k = mul(g, kept); y = mul(k, scale)
aten.mean.dim: x last true -> y: t = row_sum(x); y = mul(t, per_column)
aten.sum.dim_IntList: x last true -> y: y = row_sum(x)
aten.sum.dim_IntList: x rows _ -> y: y = col_sum(x)
aten.amax.default: x last true -> y: y = row_max(x)
aten._softmax.default: x last _ -> y: top = row_max(x); d = sub(x, top); e = exp(d); t = row_sum(e); y = div(e, t)
aten._safe_softmax.default: x last -> y: top = row_max(x); low = maximum(top, -3e38); d = sub(x, low); e = exp(d);
    t = row_sum(e); some = maximum(t, 1e-30); y = div(e, some)
aten._softmax_backward_data.default: g y0 last _ -> y: w = mul(g, y0); t = row_sum(w); d = sub(g, t); y = mul(y0, d)
aten._log_softmax.default: x last _ -> y:
    top = row_max(x); d = sub(x, top); e = exp(d); t = row_sum(e); l = log(t); y = sub(d, l)
aten._log_softmax_backward_data.default: g y0 last _ -> y: p = exp(y0); t = row_sum(g); pt = mul(p, t); y = sub(g, pt)
aten.native_layer_norm.default: x _ w b eps -> y m r:
    t = row_sum(x); m = mul(t, per_column); d = sub(x, m); q = mul(d, d); u = row_sum(q); v = mul(u, per_column);
    e = add(v, eps); r = rsqrt(e); h = mul(d, r); s = mul(h, w); y = add(s, b)
aten.native_layer_norm_backward.default: g x _ m r w b [true,true,true] -> dx dw db:
    d = sub(x, m); h = mul(d, r); gh = mul(g, h); dw = col_sum(gh); db = col_sum(g); u = mul(g, w); t = row_sum(u);
    a = mul(t, per_column); uh = mul(u, h); k = row_sum(uh); c = mul(k, per_column); hc = mul(h, c); ua = sub(u, a);
    o = sub(ua, hc); dx = mul(o, r)
"""


@dataclass(frozen=True)
class Pattern:
    """One op as steps.

    Args:
        op: what it is called.
        args: what must stand at each position.
        keywords: what must stand at each keyword.
        results: the names of what it makes, in order.
        steps: what makes them.
    """

    op: str
    args: tuple[str, ...]
    keywords: Mapping[str, str]
    results: tuple[str, ...]
    steps: tuple[Step, ...]

    def making(self, results: Collection[str]) -> list[Step]:
        """The steps that these results need."""
        needed, found = set(results), list[Step]()
        for step in reversed(self.steps):
            if step.name in needed:
                needed.update(a for a in step.args if isinstance(a, str))
                found.append(step)
        return found[::-1]


def _pattern(line: str) -> Pattern:
    op, signature, steps = line.split(": ")
    given, results = (side.split() for side in signature.split(" -> "))
    args = tuple(word for word in given if "=" not in word)
    keywords = dict(word.split("=") for word in given if "=" in word)
    return Pattern(op, args, keywords, tuple(results), tuple(map(parse_step, steps.split("; "))))


def _by_op(lines: str) -> Mapping[str, tuple[Pattern, ...]]:
    found: dict[str, tuple[Pattern, ...]] = {}
    for line in re.sub(r"\n +", " ", lines.strip()).splitlines():
        pattern = _pattern(line)
        found[pattern.op] = (*found.get(pattern.op, ()), pattern)
    return found


PATTERNS: Mapping[str, tuple[Pattern, ...]] = _by_op(_LINES)
"""Patterns by the op that they are of; the first that matches counts."""
