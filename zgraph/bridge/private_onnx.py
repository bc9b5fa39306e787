"""The op that ONNX's DequantizeLinear is made of. Tried on torch 2.13.0."""

from __future__ import annotations

import torch

__all__ = ["dequantised"]


def dequantised(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows of int8 as numbers, fp32 [rows, columns], by an op that an exporter to ONNX writes as DequantizeLinear.

    Args:
        data: int8 [rows, columns].
        scale: fp32 [rows, 1].
    """
    import torch.ao.quantization.fx._decomposed  # registers the op

    zeros = torch.zeros(len(data), dtype=torch.int8, device=data.device)
    op = torch.ops.quantized_decomposed.dequantize_per_channel.default
    made: torch.Tensor = op(data, scale[:, 0], zeros, 0, -128, 127, torch.int8)
    return made
