"""The fused attention ops of GPUs on processors: so graphs that were captured as GPUs run them can be interpreted.

They compute what the processor's fused op does, and lay their results out as the GPU's are. With dropout there are
none: what a GPU draws, nobody else does.
"""

from __future__ import annotations

from typing import Any

import torch

from zgraph.errors import UnknownOpError

aten: Any = torch.ops.aten
_library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _like(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Results of an op as it would make them, without their numbers."""
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    made = op(*on_meta, **kwargs)
    return [
        torch.empty_strided(m.size(), m.stride(), dtype=m.dtype).zero_() if isinstance(m, torch.Tensor) else m
        for m in made
    ]


def _heads(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values with a head for each of the query's."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _fill(
    made: list[Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: Any,
) -> tuple[Any, ...]:
    """Forward: the output and the logarithms of the sums, in the first two results."""
    _refuse(dropout)
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        q, _heads(k, q), _heads(v, q), 0.0, causal, attn_mask=mask, scale=scale
    )
    made[0].copy_(out)
    if made[1].numel():
        made[1].view(*sums.shape[:2], -1)[..., : sums.shape[-1]].copy_(sums)
    return tuple(made)


def _grads(
    grad: torch.Tensor,
    qkv: Grads,
    out: torch.Tensor,
    sums: torch.Tensor,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: Any,
    laid_out: list[torch.Tensor],
) -> Grads:
    """Backward: the gradients of query, key and value, put into these."""
    _refuse(dropout)
    q, k, v = qkv
    kept = sums.reshape(*sums.shape[:2], -1)[..., : q.shape[2]].contiguous()
    kept = kept.double() if q.dtype is torch.float64 else kept  # which no GPU computes in
    made = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, _heads(k, q), _heads(v, q), out, kept, 0.0, causal, attn_mask=mask, scale=scale
    )
    of_query, *others = made
    folded = [g.view(t.shape[0], t.shape[1], -1, *t.shape[2:]).sum(2) for g, t in zip(others, (k, v), strict=True)]
    for home, gradient in zip(laid_out, (of_query, *folded), strict=False):
        home.copy_(gradient)
    return laid_out[0], laid_out[1], laid_out[2]


def _refuse(dropout: float) -> None:
    if dropout:
        raise UnknownOpError(
            "attention with dropout draws on a GPU what no processor does; trace the model without dropout instead"
        )


def _flash(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, debug: bool = False, *, scale: Any = None
) -> Any:
    made = _like(aten._scaled_dot_product_flash_attention, (q, k, v, dropout_p, is_causal, debug), {"scale": scale})
    return _fill(made, q, k, v, None, dropout_p, is_causal, scale)


def _flash_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    sums: Any,
    cum_q: Any,
    cum_k: Any,
    max_q: Any,
    max_k: Any,
    dropout_p: float,
    is_causal: bool,
    seed: Any,
    offset: Any,
    *,
    scale: Any = None,
) -> Any:
    args = grad, q, k, v, out, sums, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset
    made = _like(aten._scaled_dot_product_flash_attention_backward, args, {"scale": scale})
    return _grads(grad, (q, k, v), out, sums, None, dropout_p, is_causal, scale, made)


def _efficient(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    keeps_sums: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
) -> Any:
    args = q, k, v, bias, keeps_sums, dropout_p, is_causal
    made = _like(aten._scaled_dot_product_efficient_attention, args, {"scale": scale})
    return _fill(made, q, k, v, bias, dropout_p, is_causal, scale)


def _efficient_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    sums: Any,
    seed: Any,
    offset: Any,
    dropout_p: float,
    wanted: list[bool],
    is_causal: bool = False,
    *,
    scale: Any = None,
) -> Any:
    if len(wanted) > 3 and wanted[3] and bias is not None:
        raise UnknownOpError("no processor computes the gradient of an attention's bias; detach the mask")
    args = grad, q, k, v, bias, out, sums, seed, offset, dropout_p, wanted, is_causal
    made = _like(aten._scaled_dot_product_efficient_attention_backward, args, {"scale": scale})
    return *_grads(grad, (q, k, v), out, sums, bias, dropout_p, is_causal, scale, made), made[3]


def _cudnn(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    keeps_sums: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    debug: bool = False,
    *,
    scale: Any = None,
) -> Any:
    args = q, k, v, bias, keeps_sums, dropout_p, is_causal, debug
    made = _like(aten._scaled_dot_product_cudnn_attention, args, {"scale": scale})
    return _fill(made, q, k, v, bias, dropout_p, is_causal, scale)


def _cudnn_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    sums: Any,
    seed: Any,
    offset: Any,
    bias: Any,
    cum_q: Any,
    cum_k: Any,
    max_q: Any,
    max_k: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: Any = None,
) -> Any:
    args = grad, q, k, v, out, sums, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal
    made = _like(aten._scaled_dot_product_cudnn_attention_backward, args, {"scale": scale})
    return _grads(grad, (q, k, v), out, sums, bias, dropout_p, is_causal, scale, made)


for _name, _kernel in {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn}.items():
    _library.impl(f"_scaled_dot_product_{_name}_attention", _kernel, "CPU")
for _name, _kernel in {"flash": _flash_backward, "efficient": _efficient_backward, "cudnn": _cudnn_backward}.items():
    _library.impl(f"_scaled_dot_product_{_name}_attention_backward", _kernel, "CPU")
