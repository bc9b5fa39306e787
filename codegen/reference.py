"""A kernel's twin in torch: the same steps on the same operands, for processors and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zgraph.aten import TO_TORCH
from zgraph.codegen.ops import OPS, Extent
from zgraph.codegen.spec import KernelSpec

Tensors = Sequence[torch.Tensor]


def run(spec: KernelSpec, inputs: Tensors, num_rows: int, compute: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What a kernel writes.

    Args:
        spec: the kernel.
        inputs: its operands, with as many numbers as their extents say, in any shape.
        num_rows: M.
        compute: the dtype of every step; fp64 makes this a reference.

    Returns:
        The outputs, shaped [M, N], [M, 1], [N] or [] by their extents; in `compute` if that is fp64.
    """
    values: dict[str, torch.Tensor] = {}
    for operand, tensor in zip(spec.inputs, inputs, strict=True):
        values[operand.name] = tensor.reshape(shape_of(operand.extent, num_rows, spec.columns)).to(compute)
    for step in spec.steps:
        args = [values[a] if isinstance(a, str) else a for a in step.args]
        values[step.name] = OPS[step.op].twin(*args)
    found = []
    for output in spec.outputs:
        dtype = compute if compute is torch.float64 else TO_TORCH[output.dtype]
        value = values[output.name].expand(shape_of(output.extent, num_rows, spec.columns))
        found.append(value.to(dtype).contiguous())
    return found


def shape_of(extent: Extent, num_rows: int, columns: int) -> tuple[int, ...]:
    """The shape of a value with this extent."""
    return {
        Extent.full: (num_rows, columns), Extent.column: (num_rows, 1), Extent.row: (columns,), Extent.scalar: ()
    }[extent]  # fmt: skip
