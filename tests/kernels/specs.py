"""Kernels of a transformer's glue, written down by hand."""

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
    """One step over flat shards; what changes from step to step are scalars in memory."""
    return KernelSpec.parse(
        f"adamw {columns}: p f32[M,N], g {dtype}[M,N], m f32[M,N], v f32[M,N], rate f32[], decay f32[], fix f32[] "
        "-> pn f32[M,N], mn f32[M,N], vn f32[M,N], pn2 bf16[M,N]; "
        "m1 = mul(m, 0.9); g1 = mul(g, 0.1); mn = add(m1, g1); gg = mul(g, g); v1 = mul(v, 0.999); "
        "g2 = mul(gg, 0.001); vn = add(v1, g2); root = sqrt(vn); low = mul(root, fix); den = add(low, 1e-08); "
        "step = div(mn, den); move = mul(step, rate); kept = mul(p, decay); pn = sub(kept, move); pn2 = mul(pn, 1.0)"
    )


SPECS = {f.__name__: f for f in (rms_norm, rms_norm_backward, softmax, swiglu, gelu_bias, adamw)}
