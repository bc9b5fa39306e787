"""A kernel's reference implementation in torch: the same steps on the same operands, for processors and for tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.codegen.ops import Extent
from zgraph.codegen.philox import uniform
from zgraph.codegen.spec import KernelSpec
from zgraph.ir import DType

Tensors = Sequence[torch.Tensor]


def _tensor_or(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function on tensors, where an argument is a number."""

    def call(*args: Any) -> torch.Tensor:
        like = next(a for a in args if isinstance(a, torch.Tensor))
        return function(*(a if isinstance(a, torch.Tensor) else like.new_tensor(a) for a in args))

    return call


TWINS: Mapping[str, Callable[..., torch.Tensor]] = {
    "copy": torch.clone,
    "add": torch.add,
    "sub": lambda a, b: a - b,
    "mul": torch.mul,
    "div": lambda a, b: a / b,
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "maximum": _tensor_or(torch.maximum),
    "minimum": _tensor_or(torch.minimum),
    "less": _tensor_or(lambda a, b: (a < b).to(a.dtype)),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    "row_sum": lambda a: a.sum(-1, keepdim=True),
    "row_max": lambda a: a.amax(-1, keepdim=True),
    "col_sum": lambda a: a.sum(0),
}
"""Each scalar operation in torch, but for random numbers, which are a function of where they are wanted."""


def run(spec: KernelSpec, inputs: Tensors, num_rows: int, compute: torch.dtype | None = None) -> list[torch.Tensor]:
    """Compute the outputs of a kernel with torch.

    Args:
        spec: the kernel.
        inputs: its operands, with as many numbers as their extents say, in any shape.
        num_rows: M.
        compute: the dtype of every step; fp64 makes this a reference. None takes fp32, or fp64 where all outputs are.

    Returns:
        The outputs, shaped [M, N], [M, 1], [N] or [] by their extents; in `compute` if that is fp64.
    """
    compute = compute or TO_TORCH[computed_in(spec)]
    values: dict[str, torch.Tensor] = {}
    for operand, tensor in zip(spec.inputs, inputs, strict=True):
        shaped = tensor.reshape(operand.extent.shape((num_rows,), spec.columns))
        values[operand.name] = shaped if operand.dtype is DType.i64 else shaped.to(compute)
    for step, frees in zip(spec.steps, spec.frees, strict=True):
        args = [values[a] if isinstance(a, str) else a for a in step.args]
        if step.op == "random":
            drawn = uniform(values[str(step.args[0])], num_rows * spec.columns)
            values[step.name] = drawn.view(num_rows, spec.columns).to(compute)
        else:
            values[step.name] = TWINS[step.op](*args)
        for name in frees:
            del values[name]
    found = []
    read = {operand.name for operand in spec.inputs}
    for output in spec.outputs:
        dtype = compute if compute is torch.float64 else TO_TORCH[output.dtype]
        value = values[output.name].expand(output.extent.shape((num_rows,), spec.columns))
        made = value.to(dtype).contiguous()
        found.append(made.clone() if output.name in read else made)
    return found


def computed_in(spec: KernelSpec) -> DType:
    """The dtype of a kernel's steps."""
    return DType.f64 if all(o.dtype is DType.f64 for o in spec.outputs) else DType.f32


def scratch_bytes(spec: KernelSpec, num_rows: int) -> int:
    """The most bytes that the reference has alive at once, beside what it reads and what it writes."""
    compute = computed_in(spec)

    def num_bytes(extent: Extent) -> int:
        return compute.itemsize * math.prod(extent.shape((num_rows,), spec.columns))

    written = {o.name for o in spec.outputs if o.dtype is compute}
    alive = {o.name: num_bytes(o.extent) for o in spec.inputs if o.dtype not in (compute, DType.i64)}
    most = sum(alive.values())
    for step, frees in zip(spec.steps, spec.frees, strict=True):
        if step.op != "copy" and step.name not in written:
            alive[step.name] = num_bytes(spec.extents[step.name])
        most = max(most, sum(alive.values()))
        for name in frees:
            alive.pop(name, None)
    return most
