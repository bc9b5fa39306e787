"""Updates of optimizers as kernels over flat memory: one pass reads parameter, gradient and state, and writes parameter
and state, and where there is a copy to compute with, that too.

Numbers that change from step to step are scalars in memory (`rate`, `decay`, `fix`, `fresh`); the others are in the
text. As every number depends on its own place only, outputs may be written over inputs.
"""

from __future__ import annotations

from functools import cache

from zgraph.codegen.spec import KernelSpec


@cache
def adamw(
    columns: int, beta1: float, beta2: float, eps: float, parameter: str = "f32", gradient: str = "f32", copy: str = ""
) -> KernelSpec:
    """AdamW (Loshchilov, Hutter: "Decoupled weight decay regularization", 2019).

    Args:
        columns: of a row.
        beta1: the decay of the first moment.
        beta2: that of the second.
        eps: added to the denominator.
        parameter: the dtype of the parameter and its two moments.
        gradient: the dtype of the gradient.
        copy: the dtype of the copy to compute with; "" if there is none.

    Scalars in memory: `rate` is the learning rate over the first moment's correction, `decay` what is left of the
    parameter by weight decay, `fix` one over the root of the second moment's correction.
    """
    return _spec(
        "adamw",
        columns,
        "mv",
        ("rate", "decay", "fix"),
        parameter,
        gradient,
        copy,
        f"m1 = mul(m, {beta1!r}); g1 = mul(g, {1 - beta1!r}); mn = add(m1, g1); gg = mul(g, g); "
        f"v1 = mul(v, {beta2!r}); g2 = mul(gg, {1 - beta2!r}); vn = add(v1, g2); root = sqrt(vn); "
        f"low = mul(root, fix); den = add(low, {eps!r}); step = div(mn, den); move = mul(step, rate); "
        "kept = mul(p, decay); pn = sub(kept, move)",
    )


@cache
def sgd(
    columns: int,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    parameter: str = "f32",
    gradient: str = "f32",
    copy: str = "",
) -> KernelSpec:
    """Stochastic gradient descent as torch has it (Sutskever et al., 2013, with the learning rate outside).

    Args:
        columns: of a row.
        momentum: how much of the last direction is kept; at 0 there is no state.
        weight_decay: times the parameter, added to the gradient.
        nesterov: whether to look ahead along the new direction.
        parameter: the dtype of the parameter and its state.
        gradient: the dtype of the gradient.
        copy: the dtype of the copy to compute with; "" if there is none.

    Scalars in memory: `rate` is the learning rate, `fresh` how much of the gradient goes into the direction: 1 at the
    first step, one less the dampening afterwards.
    """
    steps = [f"wd = mul(p, {weight_decay!r})", "d = add(g, wd)"] if weight_decay else ["d = copy(g)"]
    if momentum:
        steps += [f"m1 = mul(m, {momentum!r})", "d1 = mul(d, fresh)", "mn = add(m1, d1)"]
    if nesterov:
        steps += [f"m2 = mul(mn, {momentum!r})", "ahead = add(d, m2)"]
    direction = "ahead" if nesterov else "mn" if momentum else "d"
    name = "sgd_nesterov" if nesterov else "sgd_momentum" if momentum else "sgd"
    scalars = ("rate", "fresh") if momentum else ("rate",)
    return _spec(
        name,
        columns,
        "m" if momentum else "",
        scalars,
        parameter,
        gradient,
        copy,
        "; ".join([*steps, f"move = mul({direction}, rate)", "pn = sub(p, move)"]),
    )


@cache
def lion(
    columns: int, beta1: float, beta2: float, parameter: str = "f32", gradient: str = "f32", copy: str = ""
) -> KernelSpec:
    """Lion (Chen et al.: "Symbolic discovery of optimization algorithms", 2023, algorithm 2).

    Args:
        columns: of a row.
        beta1: how much of the moment goes into the sign.
        beta2: the decay of the moment.
        parameter: the dtype of the parameter and its moment.
        gradient: the dtype of the gradient.
        copy: the dtype of the copy to compute with; "" if there is none.

    Scalars in memory: `rate` is the learning rate, `decay` what is left of the parameter by weight decay.
    """
    return _spec(
        "lion",
        columns,
        "m",
        ("rate", "decay"),
        parameter,
        gradient,
        copy,
        f"m1 = mul(m, {beta1!r}); g1 = mul(g, {1 - beta1!r}); c = add(m1, g1); up = less(0.0, c); down = less(c, 0.0); "
        f"sign = sub(up, down); move = mul(sign, rate); kept = mul(p, decay); pn = sub(kept, move); "
        f"m2 = mul(m, {beta2!r}); g2 = mul(g, {1 - beta2!r}); mn = add(m2, g2)",
    )


def _spec(
    name: str, columns: int, states: str, scalars: tuple[str, ...], parameter: str, gradient: str, copy: str, steps: str
) -> KernelSpec:
    """Parameter, gradient, states and scalars to parameter, states and copy."""
    reads = [f"p {parameter}[M,N]", f"g {gradient}[M,N]", *(f"{s} {parameter}[M,N]" for s in states)]
    reads += [f"{s} f32[]" for s in scalars]
    writes = [f"pn {parameter}[M,N]", *(f"{s}n {parameter}[M,N]" for s in states)]
    if copy:
        writes.append(f"working {copy}[M,N]")
        steps += "; working = copy(pn)"
    return KernelSpec.parse(f"{name} {columns}: {', '.join(reads)} -> {', '.join(writes)}; {steps}")
