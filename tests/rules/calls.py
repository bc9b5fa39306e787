"""Random calls of every op that has a sharding rule."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers its ops

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.ir import allow_namespace

allow_namespace("transformers")

F = torch.float64
Made = tuple[Any, ...]
"""Arguments of a call; a dictionary at the end has its keyword arguments."""


def x(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=F)


def ints(high: int, *size: int) -> torch.Tensor:
    return torch.randint(0, high, size)


def sizes(r: random.Random, least: int = 1, most: int = 4) -> list[int]:
    return [r.choice((1, 2, 3, 4, 6, 8, 12)) for _ in range(r.randint(least, most))]


def broadcast(r: random.Random, size: list[int]) -> torch.Tensor:
    cut = r.randint(0, len(size)) if r.random() < 0.3 else 0
    return x(*(1 if r.random() < 0.25 else s for s in size[cut:]))


def regrouped(r: random.Random) -> tuple[list[int], list[int]]:
    """Two shapes of one number of elements, from the same small factors."""
    small = [r.choice((1, 2, 2, 3, 4)) for _ in range(r.randint(2, 5))]

    def group() -> list[int]:
        out: list[int] = []
        for f in small:
            if out and r.random() < 0.5:
                out[-1] *= f
            else:
                out.append(f)
        return out

    old, new = group(), group()
    if r.random() < 0.2:
        r.shuffle(new)
    return old, new


def calls(r: random.Random) -> dict[str, Callable[[], Made]]:
    """A maker of arguments for each op."""
    s = sizes(r)
    m, k, n, b = (r.choice((1, 2, 4, 6, 8, 12)) for _ in range(4))
    d = r.randrange(len(s))
    bt = [r.choice((1, 2, 4)), r.choice((2, 4, 6))]
    return {**_pointwise(r, s), **_products(r, m, k, n, b), **_views(r, s, d, m, n), **_pieces(r, s, d)} | {
        **_reductions(r, s, d),
        **_attention(r, bt),
        **_rows(r, s, bt, m, k),
        **_created(r, s, m),
        **_experts(r, k, n),
    }


def _pointwise(r: random.Random, s: list[int]) -> dict[str, Callable[[], Made]]:
    def two() -> Made:
        pair = x(*s), broadcast(r, s)
        return pair if r.random() < 0.5 else pair[::-1]

    unary = (
        *("abs", "alias", "ceil", "clone", "cos", "detach", "erf", "exp", "floor", "gelu", "isnan", "neg"),
        *("lift_fresh_copy", "reciprocal", "relu", "sigmoid", "sign", "silu", "sin", "tanh", "expm1", "softplus"),
        *("hardtanh", "leaky_relu", "elu", "trunc", "round", "clamp_min_", "logical_not"),
    )
    number = ("add", "div", "eq", "ge", "gt", "le", "lt", "mul", "ne", "sub", "rsub", "remainder")
    flags = lambda: (ints(2, *s).bool(), ints(2, *s).bool())  # noqa: E731
    same = lambda: (x(*s), x(*s))  # noqa: E731
    positive = lambda: (x(*s).abs() + 0.1,)  # noqa: E731
    return {
        **{f"aten.{op}.default": lambda: (x(*s),) for op in unary if not op.endswith("_")},
        **{f"aten.{op}.default": positive for op in ("log", "log1p", "rsqrt", "sqrt")},
        **{f"aten.{op}.Tensor": two for op in (*number[:10], "remainder")},
        **{f"aten.{op}.default": two for op in ("maximum", "minimum")},
        **{f"aten.{op}.Scalar": lambda: (x(*s), r.choice((2, 0.5, -3.0))) for op in number},
        **{f"aten.{op}.Tensor": flags for op in ("bitwise_and", "bitwise_or", "bitwise_xor")},
        **{f"aten.{op}.default": flags for op in ("logical_and", "logical_or")},
        **{f"aten.{op}_backward.default": same for op in ("gelu", "sigmoid", "silu", "tanh")},
        "aten.native_dropout_backward.default": lambda: (x(*s), ints(2, *s).bool(), 1.25),
        "aten.bitwise_not.default": lambda: (ints(2, *s).bool(),),
        "aten.clamp.default": lambda: (x(*s), -0.5, 0.5),
        "aten.clamp.Tensor": lambda: (x(*s), torch.zeros(s, dtype=F)),
        "aten.clamp_max.default": lambda: (x(*s), 0.5),
        "aten.clamp_min.default": lambda: (x(*s), 0.5),
        "aten.div.Tensor_mode": lambda: (x(*s) * 9, x(*s) + 3, {"rounding_mode": "floor"}),
        "aten.floor_divide.default": lambda: (ints(99, *s), ints(9, *s) + 1),
        "aten.masked_fill.Scalar": lambda: (x(*s), ints(2, *s).bool(), r.choice((0, -1e9))),
        "aten.pow.Tensor_Scalar": lambda: (x(*s), r.choice((2, 3, 1.0))),
        "aten.pow.Tensor_Tensor": lambda: (x(*s).abs(), x(*s)),
        "aten.softplus_backward.default": lambda: (x(*s), x(*s), 1.0, 20.0),
        "aten.threshold_backward.default": lambda: (x(*s), x(*s), 0.0),
        "aten.where.self": lambda: (ints(2, *s).bool(), x(*s), broadcast(r, s)),
        "aten._to_copy.default": lambda: (x(*s), {"dtype": torch.float64}),
    }


def _products(r: random.Random, m: int, k: int, n: int, b: int) -> dict[str, Callable[[], Made]]:
    return {
        "aten.mm.default": lambda: (x(m, k), x(k, n)),
        "aten.bmm.default": lambda: (x(b, m, k), x(b, k, n)),
        "aten.addmm.default": lambda: (x(*r.choice(((n,), (1, n), (m, n)))), x(m, k), x(k, n)),
        "aten.baddbmm.default": lambda: (x(b, m, n), x(b, m, k), x(b, k, n)),
    }


def _experts(r: random.Random, k: int, n: int) -> dict[str, Callable[[], Made]]:
    counts = [r.choice((0, 4, 8)) for _ in range(2)] + [4]
    ends, rows = torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts)
    fallback = "transformers.grouped_mm_fallback"
    return {
        "aten._grouped_mm.default": lambda: (  # in no wider floats, and of rows of 16 bytes
            (x(rows, 48).float(), x(3, 48, 48).float(), ends)
            if r.random() < 0.6
            else (x(rows, 48).float().T, x(rows, 48).float(), ends)
        ),
        f"{fallback}.default": lambda: (x(rows, k), x(3, k, n), ends),
        f"{fallback}_backward.default": lambda: (x(rows, k), x(3, k, n), ends, x(rows, n)),
    }


def _views(r: random.Random, s: list[int], d: int, m: int, n: int) -> dict[str, Callable[[], Made]]:
    old, new = regrouped(r)
    return {
        **{f"aten.{op}.default": lambda: (x(*old), new) for op in ("view", "_unsafe_view", "reshape")},
        "aten.unsqueeze.default": lambda: (x(*s), r.randint(-1, len(s))),
        "aten.squeeze.dim": lambda: (x(*s), d),
        "aten.squeeze.default": lambda: (x(*s),),
        "aten.t.default": lambda: (x(m, n),),
        "aten.transpose.int": lambda: (x(*s), d, -1),
        "aten.permute.default": lambda: (x(*s), r.sample(range(len(s)), len(s))),
        "aten.expand.default": lambda: (broadcast(r, s), s),
    }


def _pieces(r: random.Random, s: list[int], d: int) -> dict[str, Callable[[], Made]]:
    even = [*s[:d], s[d] * 3, *s[d + 1 :]]
    odd = [s[d] * r.choice((1, 1, 2, 4)) for _ in range(3)]

    def sliced() -> Made:
        if r.random() < 0.4:
            return x(*s), d, 0, max(1, s[d] // 2)
        return x(*even), d, s[d], r.choice((2 * s[d], 2 * s[d] + 1))

    return {
        "aten.slice.Tensor": sliced,
        "aten.select.int": lambda: (x(*s), d, 0),
        "aten.slice_backward.default": lambda: (x(*s), even, d, s[d], 2 * s[d], 1),
        "aten.select_backward.default": lambda: (x(*s[:d], *s[d + 1 :]), s, d, 0),
        "aten.constant_pad_nd.default": lambda: (x(*s), [1, 2], r.choice((0, 7.0))),
        "aten.cat.default": lambda: ([x(*s[:d], size, *s[d + 1 :]) for size in odd], d),
        "aten.split.Tensor": lambda: (x(*even), even[d] // 3, d),
        "aten.split_with_sizes.default": lambda: (x(*s[:d], sum(odd), *s[d + 1 :]), odd, d),
        "aten.stack.default": lambda: ([x(*s), x(*s)], d),
        "aten.unbind.int": lambda: (x(*s), d),
    }


def _reductions(r: random.Random, s: list[int], d: int) -> dict[str, Callable[[], Made]]:
    def some() -> Made:
        return x(*s), r.sample(range(len(s)), r.randint(1, len(s))), r.random() < 0.5

    return {
        **{f"aten.{op}": some for op in ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default")},
        **{f"aten.{op}.default": lambda: (x(*s),) for op in ("sum", "mean")},
        "aten._softmax.default": lambda: (x(*s), d, False),
        "aten._log_softmax.default": lambda: (x(*s), d - len(s), False),
        "aten._softmax_backward_data.default": lambda: (x(*s), x(*s), d, torch.float64),
        "aten._log_softmax_backward_data.default": lambda: (x(*s), x(*s), d, torch.float64),
        "aten._safe_softmax.default": lambda: (x(*s), d),
        "aten.cumsum.default": lambda: (x(*s), d),
        "aten.topk.default": lambda: (x(*s), 1, d),
        "aten.sort.default": lambda: (x(*s), d),
    }


def _attention(r: random.Random, bt: list[int]) -> dict[str, Callable[[], Made]]:
    keys, q, e = r.choice((2, 3, 4, 6, 8)), r.choice((2, 4, 6)), 4
    h = keys * r.choice((1, 1, 2))
    causal = r.random() < 0.5
    mask = x(*r.choice(((bt[0], 1, q, bt[1]), (1, 1, q, bt[1]), (bt[0], h, q, bt[1]))))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def arguments() -> tuple[list[torch.Tensor], dict[str, Any]]:
        masks = {} if causal else {"attn_mask": mask}
        return [x(bt[0], h, q, e), x(bt[0], keys, bt[1], e), x(bt[0], keys, bt[1], e)], {**masks, "scale": 0.3}

    def backward() -> Made:
        args, options = arguments()
        out, lse = forward(*args, 0.0, causal, **options)
        return (x(*out.shape), *args, out, lse, 0.0, causal, options)

    def on_gpu(kind: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of what a GPU has, which zgraph lets processors compute too; masks and keys are for every head."""
        (q_, k, v), options = arguments()
        k, v = (k, v) if kind == "flash" else (x(bt[0], h, bt[1], e), x(bt[0], h, bt[1], e))
        has_bias = "attn_mask" in options and kind != "flash"
        bias = options["attn_mask"].expand(bt[0], h, q, bt[1]) if has_bias else None
        flags = (0.0, causal) if kind == "flash" else (bias, True, 0.0, causal)
        return (q_, k, v), flags

    def device(kind: str) -> Made:
        args, flags = on_gpu(kind)
        return (*args, *flags, {"scale": 0.3})

    def device_backward(kind: str) -> Made:
        args, flags = on_gpu(kind)
        op = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
        made, scale = op(*args, *flags, scale=0.3), {"scale": 0.3}
        grad, bias = x(*made[0].shape), flags[0]
        if kind == "flash":
            return (grad, *args, *made[:2], None, None, q, bt[1], 0.0, causal, made[6], made[7], scale)
        if kind == "efficient":
            return (grad, *args, bias, *made[:4], 0.0, [True, True, True, False], causal, scale)
        return (grad, *args, *made[:2], made[6], made[7], bias, None, None, q, bt[1], 0.0, causal, scale)

    kinds = ("flash", "efficient", "cudnn")
    return {
        **{f"aten._scaled_dot_product_{kind}_attention.default": functools.partial(device, kind) for kind in kinds},
        **{
            f"aten._scaled_dot_product_{kind}_attention_backward.default": functools.partial(device_backward, kind)
            for kind in kinds
        },
        "aten._scaled_dot_product_flash_attention_for_cpu.default": lambda: (
            lambda found: (*found[0], 0.0, causal, found[1])
        )(arguments()),
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": backward,
    }


def _rows(r: random.Random, s: list[int], bt: list[int], m: int, k: int) -> dict[str, Callable[[], Made]]:
    norm, lead = sizes(r, 1, 2), sizes(r, 1, 2)
    flat, stat = [*lead, *norm], [*lead, *(1 for _ in norm)]
    d = r.randrange(len(s))

    def slots() -> Made:
        """Places of rows written, with a dim between the indices that passes: a cache of keys and values."""
        places = torch.stack([torch.randperm(7)[:2] for _ in range(3)])
        return x(3, k, 7, 5), [torch.arange(3)[:, None], None, places], x(3, 2, k, 5)

    return {
        "aten.embedding.default": lambda: (x(8, k), ints(8, *bt)),
        "zgraph.int8_embedding.default": lambda: (
            *(torch.randint(-127, 128, (8, k), dtype=torch.int8), ints(8, *bt), torch.rand(8, 1)),
        ),
        "zgraph.int8_linear.default": lambda: (
            *(x(m, k), torch.randint(-127, 128, (12, k), dtype=torch.int8), torch.rand(12, 1), 3, F),
        ),
        "zgraph.int4_linear.default": lambda: (
            *(
                x(m, 32 * k),
                torch.randint(256, (12, 16 * k), dtype=torch.uint8),
                torch.rand(k, 12, 2).bfloat16(),
                32,
                F,
            ),
        ),
        "aten.embedding_dense_backward.default": lambda: (
            *(x(*bt, k), ints(8, *bt), 8, r.choice((-1, 3)), r.random() < 0.3),
        ),
        "aten.index_put.default": lambda: (
            (x(7, k), [ints(7, m)], x(m, k), True)
            if r.random() < 0.5
            else slots()
            if r.random() < 0.5
            else (x(12, k), [torch.randperm(12)[:m]], x(m, k))
        ),
        "aten.index_put_.default": slots,
        "aten.scatter.src": lambda: (x(*s), d, ints(s[d], *s[:d], 1, *s[d + 1 :]), x(*s[:d], 1, *s[d + 1 :])),
        "aten.gather.default": lambda: (x(*s), d, ints(s[d], *s[:d], 5, *s[d + 1 :])),
        "aten.index.Tensor": lambda: (
            (x(5, 7, k), [ints(5, m, 1), ints(7, 1, 4)]) if r.random() < 0.5 else (x(5, k), [ints(5, m)])
        ),
        "aten.native_layer_norm.default": lambda: (x(*flat), norm, x(*norm), x(*norm), 1e-5),
        "aten.native_layer_norm_backward.default": lambda: (
            *(x(*flat), x(*flat), norm, x(*stat), x(*stat), x(*norm), x(*norm), [True, True, True]),
        ),
        "aten.nll_loss_forward.default": lambda: (x(12 * m, k), ints(k, 12 * m), None, r.choice((0, 2, 2, 1)), -100),
        "aten.nll_loss_backward.default": lambda: (
            *(x(), x(12 * m, k), ints(k, 12 * m), None, r.choice((1, 2)), -100, torch.tensor(float(m), dtype=F)),
        ),
    }


def _created(r: random.Random, s: list[int], m: int) -> dict[str, Callable[[], Made]]:
    return {
        **{f"aten.{op}.default": lambda: (x(*s), sizes(r)) for op in ("new_zeros", "new_ones")},
        "aten.new_full.default": lambda: (x(*s), sizes(r), 2.5),
        **{f"aten.{op}.default": lambda: (s, {"dtype": torch.float64}) for op in ("zeros", "ones")},
        **{f"aten.{op}.default": lambda: (x(*s),) for op in ("zeros_like", "ones_like")},
        "aten.full_like.default": lambda: (x(*s), 2.5),
        "aten.full.default": lambda: (s, 2.5, {"dtype": torch.float64}),
        "aten.scalar_tensor.default": lambda: (1.5, {"dtype": torch.float64}),
        "aten.arange.default": lambda: (m,),
        "aten.arange.start": lambda: (1, m + 1),
        "aten.arange.start_step": lambda: (0, 8, 2),
    }
