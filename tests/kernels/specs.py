"""Kernels of a transformer's glue, written down by hand, and those of the optimizers."""

from zgraph.codegen import updates
from zgraph.codegen.spec import KernelSpec


def rms_norm(columns: int, dtype: str = "f32") -> KernelSpec:
    return KernelSpec.parse(
        f"rms_norm {columns}: x {dtype}[M,N], w {dtype}[N] -> y {dtype}[M,N], r f32[M,1]; "
        f"s = mul(x, x); t = row_sum(s); m = mul(t, {1 / columns!r}); e = add(m, 1e-06); r = rsqrt(e); "
        "h = mul(x, r); y = mul(h, w)"
    )


def rms_norm_backward(columns: int, dtype: str = "f32") -> KernelSpec:
    return KernelSpec.parse(
        f"rms_norm_backward {columns}: g {dtype}[M,N], x {dtype}[M,N], w {dtype}[N], r f32[M,1] "
        f"-> dx {dtype}[M,N], dw f32[N]; h = mul(x, r); gh = mul(g, h); dw = col_sum(gh); u = mul(g, w); "
        f"uh = mul(u, h); t = row_sum(uh); m = mul(t, {1 / columns!r}); c = mul(h, m); d = sub(u, c); dx = mul(d, r)"
    )


def softmax(columns: int, dtype: str = "f32") -> KernelSpec:
    return KernelSpec.parse(
        f"softmax {columns}: x {dtype}[M,N] -> y {dtype}[M,N]; "
        "top = row_max(x); d = sub(x, top); e = exp(d); t = row_sum(e); y = div(e, t)"
    )


def swiglu(columns: int, dtype: str = "f32") -> KernelSpec:
    return KernelSpec.parse(
        f"swiglu {columns}: gate {dtype}[M,N], up {dtype}[M,N] -> y {dtype}[M,N]; "
        "s = sigmoid(gate); a = mul(gate, s); y = mul(a, up)"
    )


def gelu_bias(columns: int, dtype: str = "f32") -> KernelSpec:
    return KernelSpec.parse(
        f"gelu_bias {columns}: x {dtype}[M,N], b {dtype}[N] -> y {dtype}[M,N]; z = add(x, b); "
        f"v = mul(z, {2**-0.5!r}); f = erf(v); p = add(f, 1.0); q = mul(z, 0.5); y = mul(q, p)"
    )


def adamw(columns: int, dtype: str = "f32") -> KernelSpec:
    return updates.adamw(columns, 0.9, 0.999, 1e-8, gradient=dtype, copy="bf16")


def sgd(columns: int, dtype: str = "f32") -> KernelSpec:
    return updates.sgd(columns, 0.0, 0.0, False, gradient=dtype)


def sgd_momentum(columns: int, dtype: str = "f32") -> KernelSpec:
    return updates.sgd(columns, 0.9, 0.01, False, dtype, dtype)


def sgd_nesterov(columns: int, dtype: str = "f32") -> KernelSpec:
    return updates.sgd(columns, 0.9, 0.01, True, gradient=dtype, copy="f16")


def lion(columns: int, dtype: str = "f32") -> KernelSpec:
    return updates.lion(columns, 0.9, 0.99, gradient=dtype, copy="bf16")


UPDATES = {f.__name__: f for f in (adamw, sgd, sgd_momentum, sgd_nesterov, lion)}

SPECS = {f.__name__: f for f in (rms_norm, rms_norm_backward, softmax, swiglu, gelu_bias)} | UPDATES

EPILOGUES = {
    "plain": "-> y {t}[M,N]; y = copy(acc)",
    "bias and relu": ", x0 {t}[N] -> z {t}[M,N], y {t}[M,N]; z = add(acc, x0); y = maximum(z, 0.0)",
    "bias and gelu": ", x0 {t}[N] -> y {t}[M,N]; z = add(acc, x0); v = mul(z, 0.7071067811865476); f = erf(v); "
    "p = add(f, 1.0); q = mul(z, 0.5); y = mul(q, p)",
    "gate": ", x0 {t}[M,N] -> y {t}[M,N]; s = sigmoid(x0); a = mul(x0, s); y = mul(a, acc)",
    "gradient, and that of a bias": ", x0 {t}[M,N], x1 {t}[M,1] -> y {t}[M,N], b {t}[N]; k = less(0.0, x0); "
    "d = mul(acc, k); y = mul(d, x1); b = col_sum(y)",
    "dropout": ", x0 i64[] -> y {t}[M,N]; u = random(x0); k = less(0.5, u); d = mul(acc, k); y = mul(d, 2.0)",
}
"""Steps that follow a matmul, by name; `{t}` is the dtype of their operands."""


def epilogue(name: str, columns: int, dtype: str) -> KernelSpec:
    text = EPILOGUES[name].format(t=dtype)
    return KernelSpec.parse(f"mm {columns}: acc f32[M,N]{'' if text[0] == ',' else ' '}{text}")
