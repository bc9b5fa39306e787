"""Kernels as ops of torch: `zgraph::rows` runs one over rows, by Triton on GPUs and by its twin elsewhere.

The ops are registered when this module is imported. They have fake implementations, so that what traces torch sees
through them; a graph that calls them is differentiated before they are put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from zgraph.aten import TO_TORCH
from zgraph.codegen import kernels, reference
from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import KernelSpec
from zgraph.cost.workspace import REGISTERED
from zgraph.ir import Node
from zgraph.ir.symbols import evaluate

_LIBRARY: Any = torch.library.Library("zgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("rows(Tensor[] inputs, str kernel) -> Tensor[]")

_parsed = cache(KernelSpec.parse)


def _shapes(spec: KernelSpec, inputs: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """What the outputs look like: rows as the first input that has all of them."""
    like = next(t for operand, t in zip(spec.inputs, inputs, strict=True) if operand.extent is Extent.full)
    by_extent = {Extent.full: tuple(like.shape), Extent.column: (*like.shape[:-1], 1), Extent.row: (spec.columns,)}
    return [by_extent.get(output.extent, ()) for output in spec.outputs]


def _shaped(spec: KernelSpec, inputs: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [out.view(shape) for out, shape in zip(made, _shapes(spec, inputs), strict=True)]


def _num_rows(spec: KernelSpec, inputs: Sequence[torch.Tensor]) -> int:
    like = next(t for operand, t in zip(spec.inputs, inputs, strict=True) if operand.extent is Extent.full)
    return like.numel() // spec.columns


def _rows_fake(inputs: list[torch.Tensor], kernel: str) -> list[torch.Tensor]:
    spec = _parsed(kernel)
    return [
        inputs[0].new_empty(shape, dtype=TO_TORCH[output.dtype])
        for output, shape in zip(spec.outputs, _shapes(spec, inputs), strict=True)
    ]


def _rows_twin(inputs: list[torch.Tensor], kernel: str) -> list[torch.Tensor]:
    spec = _parsed(kernel)
    return _shaped(spec, inputs, reference.run(spec, inputs, _num_rows(spec, inputs)))


def _rows_triton(inputs: list[torch.Tensor], kernel: str) -> list[torch.Tensor]:
    spec = _parsed(kernel)
    return _shaped(spec, inputs, kernels.launch(spec, inputs, _num_rows(spec, inputs)))


def _rows_scratch(node: Node, hints: Mapping[str, int]) -> int:
    spec = _parsed(str(node.args[1]))
    like = next(v for o, v in zip(spec.inputs, node.operands, strict=True) if o.extent is Extent.full)
    return reference.scratch_bytes(spec, evaluate(like.tensor.numel, hints) // spec.columns)


REGISTERED["zgraph.rows"] = _rows_scratch
_LIBRARY.impl("rows", _rows_twin, "CPU")
_LIBRARY.impl("rows", _rows_triton, "CUDA")
torch.library.register_fake("zgraph::rows", _rows_fake, lib=_LIBRARY)
