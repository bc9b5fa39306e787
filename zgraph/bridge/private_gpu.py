"""Ops as GPUs have them, captured on a machine without one. A private corner of torch, tried on torch 2.13.0.

torch takes other ops on GPUs for what a model calls: attention is one of three fused ops, with other results and other
strides than the processor's, and dropout is one op. Here these are chosen as torch chooses them on a GPU of a compute
capability, while everything is on the processor and without data. Autograd knows their backwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention.flex_attention
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "TORCH_KERNELS",
    "Capability",
    "as_on_gpu",
    "attention_on_gpu",
    "chosen_attention",
    "flex_attention_on_gpu",
]

Capability = tuple[int, int]
"""A GPU's compute capability, major and minor."""

aten: Any = torch.ops.aten
_ATTENTIONS = (torch.nn.functional.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
_DROPOUTS = (torch.nn.functional.dropout,)
_HALF = (torch.float16, torch.bfloat16)
_ALIGN_BYTES = 16


def as_on_gpu(capability: Capability) -> Callable[[fx.GraphModule], None]:
    """Function that has a captured forward call what a GPU would run, though tensors are on the processor.

    The device in arguments stays the processor's. What a model asks of the device itself is answered for the processor.
    """

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
        kind = attention_on_gpu(query, key, value, attn_mask, dropout_p, enable_gqa, capability)
        has_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        options = dropout_p, is_causal
        if kind == "cudnn":
            made = aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, has_grad, *options, False, scale=scale
            )
        elif kind == "flash":
            scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            made = aten._scaled_dot_product_flash_attention(query, key, value, *options, False, scale=scale)
        elif kind == "efficient":
            mask = None if attn_mask is None else _expanded(attn_mask, query, key)
            made = aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, has_grad, *options, scale=scale
            )
        else:
            made = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, *options, scale=scale, enable_gqa=enable_gqa
            )
        return made[0]

    def rewrite(gm: fx.GraphModule) -> None:
        for part in gm.modules():
            if isinstance(part, fx.GraphModule):
                for node in part.graph.nodes:
                    if node.target in _ATTENTIONS:
                        node.target = attention
                    elif node.target in _DROPOUTS:
                        node.target = _dropout
                part.recompile()

    return rewrite


TORCH_KERNELS = ("math", "efficient", "flash", "cudnn")
"""Kernels of attention that torch can be told to take."""

_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def chosen_attention(kernel: str | None) -> Iterator[None]:
    """Have torch take one kernel of attention, and "math" where that cannot be; its own choice for any other word."""
    if kernel not in _BACKENDS:
        yield
        return
    with sdpa_kernel([_BACKENDS[kernel], SDPBackend.MATH]):
        yield


@contextmanager
def flex_attention_on_gpu() -> Iterator[None]:
    """Let attention by functions be captured with gradients: torch has its backward on GPUs, and refuses processors."""
    owner: Any = torch.nn.attention.flex_attention
    before, owner._validate_device = owner._validate_device, _takes_any_device
    try:
        yield
    finally:
        owner._validate_device = before


def _takes_any_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    pass


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Dropout as a GPU has it, under the names of arguments that `torch.nn.functional.dropout` has."""
    if inplace or not (training and 0 < p <= 1 and input.numel()):
        return torch.nn.functional.dropout(input, p, training, inplace)
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    return aten.native_dropout(input, p, training)[0]


def attention_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    capability: Capability,
) -> str:
    """Kind of attention that torch takes on a GPU: "cudnn", "flash", "efficient" or "math".

    The rules are those of torch 2.13 (`sdp_utils.cpp`), for dense tensors without symbols in their last dimension.
    """
    flags: Any = torch.backends.cuda
    major, minor = capability
    width, value_width = int(query.shape[-1]), int(value.shape[-1])
    is_fused = query.dim() == key.dim() == value.dim() == 4 and query.dtype == key.dtype == value.dtype
    is_fused = is_fused and (enable_gqa or query.shape[1] == key.shape[1] == value.shape[1])
    if not is_fused or any(t.stride(-1) != 1 for t in (query, key, value)):
        return "math"
    fits = query.dtype in _HALF and width == value_width and width <= 256 and width % 8 == 0
    prefers_cudnn = major in (9, 10) and minor == 0 and "TORCH_CUDNN_SDPA_DEPRIORITIZED" not in os.environ
    if prefers_cudnn and fits and flags.cudnn_sdp_enabled():
        return "cudnn"
    if fits and mask is None and capability >= (8, 0) and flags.flash_sdp_enabled():
        return "flash"
    align = _ALIGN_BYTES // query.dtype.itemsize if capability >= (8, 0) or query.dtype in _HALF else 1
    takes = query.dtype in (*_HALF, torch.float32) and (query.dtype != torch.bfloat16 or capability >= (8, 0))
    if takes and width % align == value_width % align == 0 and flags.mem_efficient_sdp_enabled():
        return "efficient"
    return "math"


def _expanded(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as the efficient kernel takes it: for each row and head, its rows padded to whole 16 elements."""
    columns = mask.shape[-1]
    if columns % 16:
        mask = torch.nn.functional.pad(mask, (0, 16 - columns % 16))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
