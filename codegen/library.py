"""Kernels as ops of torch: `zgraph::rows` runs one over rows, by Triton on GPUs and by its reference elsewhere;
`zgraph::linear_cross_entropy` is the loss of a projection, block by block (`loss.py`), `zgraph::rotary` the rotary
embedding (`rotary.py`).

The ops are registered when this module is imported. They have fake implementations, so that what traces torch sees
through them; a graph that calls them is differentiated before they are put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import torch

from zgraph.bridge import private_inductor
from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.private_inductor import Example, Lowered
from zgraph.codegen import codes as _codes  # noqa: F401 - registers the kernels
from zgraph.codegen import distillation as _distillation  # noqa: F401 - registers the ops
from zgraph.codegen import float8, kernels, loss, matmul, quantised, reference, rotary
from zgraph.codegen import topk_distillation as _topk_distillation  # noqa: F401 - registers the ops
from zgraph.codegen.fallback import launched
from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import KernelSpec
from zgraph.cost.device_workspace import REGISTERED as ON_DEVICE
from zgraph.cost.workspace import REGISTERED
from zgraph.ir import Node
from zgraph.ir.symbols import evaluate

T = TypeVar("T")

Tensor = torch.Tensor

MAX_SEED = 1 << 31

_LIBRARY: Any = torch.library.Library("zgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("rows(Tensor[] inputs, str kernel) -> Tensor[]")
_LIBRARY.define("compiled(Tensor[] inputs, str kernel) -> Tensor[]")
_LIBRARY.define("matmul(Tensor a, Tensor b, Tensor[] inputs, str kernel) -> Tensor[]")
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, int[] order, bool back) -> Tensor")
_LIBRARY.define("seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_LIBRARY.define("cross_entropy(Tensor logits, Tensor target, int ignore_index, bool mean) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "cross_entropy_backward(Tensor tangent, Tensor logits, Tensor target, Tensor number, Tensor lse, int ignore_index, "
    "bool mean) -> Tensor"
)
_LIBRARY.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, int ignore_index, bool mean) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_cross_entropy_backward(Tensor tangent, Tensor x, Tensor weight, Tensor target, Tensor number, Tensor lse, "
    "int ignore_index, bool mean) -> (Tensor, Tensor)"
)

_LIBRARY.define("to_float8(Tensor x, ScalarType dtype, int? dim) -> (Tensor, Tensor)")
_LIBRARY.define("float8_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType dtype, bool fast) -> Tensor")

_LIBRARY.define("to_int8(Tensor x, int parts) -> (Tensor, Tensor)")
_LIBRARY.define("int8_mm(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, ScalarType dtype) -> Tensor")
_LIBRARY.define("int8_linear(Tensor x, Tensor w, Tensor scale, int parts, ScalarType dtype) -> Tensor")
_LIBRARY.define("int8_embedding(Tensor w, Tensor index, Tensor scale) -> Tensor")
_LIBRARY.define("int4_linear(Tensor x, Tensor pairs, Tensor scales, int group, ScalarType dtype) -> Tensor")
_LIBRARY.define("to_int4(Tensor w, int group) -> (Tensor, Tensor)")
_LIBRARY.define("pack_int4(Tensor pairs) -> Tensor")
_LIBRARY.define("int4_mm(Tensor x, Tensor w, Tensor scales, int group, ScalarType dtype) -> Tensor")

_parsed = cache(KernelSpec.parse)


def _like(spec: KernelSpec, given: Sequence[T]) -> T:
    """The first input that has all rows."""
    return next(t for operand, t in zip(spec.inputs, given, strict=True) if operand.extent is Extent.full)


def _shapes(spec: KernelSpec, like: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the outputs, with the rows of `like`."""
    return [output.extent.shape(like.shape[:-1], spec.columns) for output in spec.outputs]


def _viewed(spec: KernelSpec, like: Tensor, made: list[Tensor]) -> list[Tensor]:
    return [out.view(shape) for out, shape in zip(made, _shapes(spec, like), strict=True)]


def _fakes(spec: KernelSpec, like: Tensor) -> list[Tensor]:
    dtypes = (TO_TORCH[output.dtype] for output in spec.outputs)
    return [like.new_empty(s, dtype=dtype) for s, dtype in zip(_shapes(spec, like), dtypes, strict=True)]


def _rows(
    how: Callable[[KernelSpec, list[Tensor], int], list[Tensor]],
) -> Callable[[list[Tensor], str], list[Tensor]]:
    def run(inputs: list[Tensor], kernel: str) -> list[Tensor]:
        spec = _parsed(kernel)
        like = _like(spec, inputs)
        return _viewed(spec, like, how(spec, inputs, like.numel() // spec.columns))

    return run


def _rows_fake(inputs: list[Tensor], kernel: str) -> list[Tensor]:
    spec = _parsed(kernel)
    return _fakes(spec, _like(spec, inputs))


_BY_INDUCTOR: dict[tuple[object, ...], Callable[[list[Tensor]], Sequence[Tensor]]] = {}
"""Functions that Inductor compiled from a kernel's steps, by the kernel, the device and the sizes of its inputs."""


def _compiled(spec: KernelSpec, inputs: list[Tensor], num_rows: int) -> list[Tensor]:
    return launched(
        ("inductor", spec),
        lambda: _by_inductor(spec, inputs, num_rows),
        lambda: reference.run(spec, inputs, num_rows),
    )


def compile_together(kernels: Iterable[tuple[str, Sequence[Example]]]) -> None:
    """Have Inductor compile kernels for dense inputs like these, all at once; one that fails is compiled again when it
    is run, and fails there.
    """
    begun: dict[tuple[object, ...], Lowered] = {}
    for text, inputs in kernels:
        spec = _parsed(text)
        key = _key(spec, inputs[0].device, (e.size for e in inputs))
        if key not in _BY_INDUCTOR and key not in begun:
            with suppress(Exception):
                begun[key] = _lowered(spec, inputs, math.prod(_like(spec, inputs).size) // spec.columns)
    for key, lowered in begun.items():
        with suppress(Exception):
            _BY_INDUCTOR[key] = lowered.ready()


def _key(spec: KernelSpec, device: torch.device, shapes: Iterable[Sequence[int]]) -> tuple[object, ...]:
    return spec, device, *map(tuple, shapes)


def _lowered(spec: KernelSpec, inputs: Sequence[Example | Tensor], num_rows: int) -> Lowered:
    return private_inductor.lowered(lambda *given: reference.run(spec, given, num_rows), inputs)


def _by_inductor(spec: KernelSpec, inputs: list[Tensor], num_rows: int) -> list[Tensor]:
    dense = [t.contiguous() for t in inputs]
    key = _key(spec, dense[0].device, (t.shape for t in dense))
    if key not in _BY_INDUCTOR:
        _BY_INDUCTOR[key] = _lowered(spec, dense, num_rows).ready()
    taken = {t.data_ptr() for t in dense}
    apart = []
    for out in _BY_INDUCTOR[key]([*dense]):  # Inductor may give the same memory out twice
        apart.append(out.clone() if out.data_ptr() in taken else out)
        taken.add(out.data_ptr())
    return apart


def _rows_scratch(node: Node, hints: Mapping[str, int]) -> int:
    spec = _parsed(str(node.args[1]))
    return reference.scratch_bytes(spec, evaluate(_like(spec, node.operands).tensor.numel, hints) // spec.columns)


def _rows_device_scratch(node: Node, hints: Mapping[str, int]) -> int:
    """The sums over rows that each program writes: those of others are results."""
    spec = _parsed(str(node.args[1]))
    num_rows = evaluate(_like(spec, node.operands).tensor.numel, hints) // spec.columns
    num_programs = min(-(-num_rows // kernels.tiles(spec).block_m), kernels.MAX_PROGRAMS)
    return 4 * num_programs * spec.columns * len(spec.row_sums)


def _matmul(
    how: Callable[[KernelSpec, Tensor, Tensor, list[Tensor]], list[Tensor]],
) -> Callable[[Tensor, Tensor, list[Tensor], str], list[Tensor]]:
    def run(a: Tensor, b: Tensor, inputs: list[Tensor], kernel: str) -> list[Tensor]:
        spec = _parsed(kernel)
        return _viewed(spec, a, how(spec, a, b, inputs))

    return run


def _matmul_fake(a: Tensor, b: Tensor, inputs: list[Tensor], kernel: str) -> list[Tensor]:
    return _fakes(_parsed(kernel), a)


def _matmul_scratch(node: Node, hints: Mapping[str, int]) -> int:
    a = node.operands[0].tensor
    num_rows = evaluate(a.numel, hints) // evaluate(a.shape[-1], hints)
    return matmul.scratch_bytes(_parsed(str(node.args[3])), num_rows, a.dtype.itemsize)


def _matmul_device_scratch(node: Node, hints: Mapping[str, int]) -> int:
    """Sums over rows, one for each block of rows of each product."""
    a, spec = node.operands[0].tensor, _parsed(str(node.args[3]))
    *batch, num_rows, _ = (evaluate(d, hints) for d in a.shape)
    num_blocks = math.prod(batch) * -(-num_rows // matmul.tiles(spec, a.dtype.itemsize).block_m)
    return 4 * num_blocks * spec.columns * len(spec.row_sums)


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, order: Sequence[int], back: bool) -> Tensor:
    return rotary.empty(x, order)


def _rotary_scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, cos = (v.tensor for v in node.operands[:2])
    numel, columns, turned = (evaluate(d, hints) for d in (x.numel, x.shape[-1], cos.shape[-1]))
    num_angles = evaluate(cos.numel, hints)
    return rotary.scratch_bytes(numel // columns * turned, num_angles, x.dtype.itemsize, cos.dtype.itemsize)


def _seed(like: Tensor) -> Tensor:
    """A seed for kernels that draw, from torch's generator of the device."""
    return torch.randint(MAX_SEED, (), device=like.device)


def _seed_fake(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def _loss_fake(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, ...]:
    return _losses_of(x, target)


def _loss_backward_fake(tangent: Tensor, x: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight)


def _plain_loss_fake(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, ...]:
    return _losses_of(logits, target)


def _losses_of(like: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss, how many tokens count, and a number for each token."""
    each = like.new_empty(target.shape, dtype=loss.computed_in(like.dtype))
    return each.new_empty(()), each.new_empty(()), each


def _plain_loss_backward_fake(tangent: Tensor, logits: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits)


def _plain_loss_scratch(node: Node, hints: Mapping[str, int]) -> int:
    logits = next(v.tensor for v in node.operands if len(v.tensor.shape) > 1)
    num_classes = evaluate(logits.shape[-1], hints)
    return loss.plain_scratch_bytes(evaluate(logits.numel, hints) // num_classes, num_classes)


def _loss_scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, weight = (v.tensor for v in node.operands if len(v.tensor.shape) == 2)
    num_tokens, width, num_classes = (evaluate(d, hints) for d in (*x.shape, weight.shape[0]))
    return loss.scratch_bytes(num_tokens, num_classes, width, x.dtype.itemsize)


def _float8_cast_scratch(node: Node, hints: Mapping[str, int]) -> int:
    kind = node.operands[0].tensor
    numel = evaluate(kind.numel, hints)
    dense = 0 if kind.strides is None else numel * kind.dtype.itemsize
    return float8.cast_scratch_bytes(numel) + dense


def _float8_mm_scratch(node: Node, hints: Mapping[str, int]) -> int:
    a, _, b, _ = (evaluate(v.tensor.numel, hints) for v in node.operands)
    return float8.mm_scratch_bytes(a, b, evaluate(node.results[0].tensor.numel, hints))


def _to_int8_scratch(node: Node, hints: Mapping[str, int]) -> int:
    parts = node.args[1]
    assert isinstance(parts, int)
    return quantised.to_int8_scratch_bytes(evaluate(node.operands[0].tensor.numel, hints), parts)


def _int8_mm_scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, _, scale, _ = (v.tensor for v in node.operands)
    parts = evaluate(x.shape[0], hints) // max(evaluate(scale.shape[0], hints), 1)
    return quantised.int8_mm_scratch_bytes(parts, evaluate(node.results[0].tensor.numel, hints))


def _int8_linear_scratch(node: Node, hints: Mapping[str, int]) -> int:
    numel, results = (evaluate(v.tensor.numel, hints) for v in (node.operands[0], node.results[0]))
    parts = node.args[3]
    assert isinstance(parts, int)
    return quantised.to_int8_scratch_bytes(numel, parts) + quantised.int8_mm_scratch_bytes(parts, results)


def _int8_embedding_scratch(node: Node, hints: Mapping[str, int]) -> int:
    return 6 * evaluate(node.results[0].tensor.numel, hints)  # integers, and the same in fp32


def _int4_linear_scratch(node: Node, hints: Mapping[str, int]) -> int:
    pairs = evaluate(node.operands[1].tensor.numel, hints)
    return 20 * pairs  # two integers in a byte, in 8 bits and in fp32, and the numbers


def _to_int4_scratch(node: Node, hints: Mapping[str, int]) -> int:
    return quantised.to_int4_scratch_bytes(evaluate(node.operands[0].tensor.numel, hints))


def _pack_int4_scratch(node: Node, hints: Mapping[str, int]) -> int:
    return quantised.pack_int4_scratch_bytes(evaluate(node.operands[0].tensor.numel, hints))


def _int4_mm_scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, made = node.operands[0].tensor, node.results[0].tensor
    return quantised.int4_mm_scratch_bytes(evaluate(x.numel, hints), evaluate(made.numel, hints))


REGISTERED["zgraph.rows"] = _rows_scratch
REGISTERED["zgraph.to_int8"] = ON_DEVICE["zgraph.to_int8"] = _to_int8_scratch
REGISTERED["zgraph.int8_mm"] = _int8_mm_scratch
REGISTERED["zgraph.int8_linear"] = _int8_linear_scratch
REGISTERED["zgraph.int8_embedding"] = _int8_embedding_scratch
REGISTERED["zgraph.int4_linear"] = _int4_linear_scratch
REGISTERED["zgraph.to_int4"] = ON_DEVICE["zgraph.to_int4"] = _to_int4_scratch
REGISTERED["zgraph.pack_int4"] = ON_DEVICE["zgraph.pack_int4"] = _pack_int4_scratch
REGISTERED["zgraph.int4_mm"] = _int4_mm_scratch
REGISTERED["zgraph.to_float8"] = ON_DEVICE["zgraph.to_float8"] = _float8_cast_scratch
REGISTERED["zgraph.float8_mm"] = _float8_mm_scratch
REGISTERED["zgraph.compiled"] = lambda node, hints: 0
REGISTERED["zgraph.matmul"] = _matmul_scratch
REGISTERED["zgraph.rotary"] = _rotary_scratch
REGISTERED["zgraph.linear_cross_entropy"] = REGISTERED["zgraph.linear_cross_entropy_backward"] = _loss_scratch
REGISTERED["zgraph.cross_entropy"] = REGISTERED["zgraph.cross_entropy_backward"] = _plain_loss_scratch
ON_DEVICE["zgraph.rows"] = ON_DEVICE["zgraph.compiled"] = _rows_device_scratch
ON_DEVICE["zgraph.matmul"] = _matmul_device_scratch
ON_DEVICE["zgraph.linear_cross_entropy"] = ON_DEVICE["zgraph.linear_cross_entropy_backward"] = _loss_scratch
ON_DEVICE["zgraph.cross_entropy"] = ON_DEVICE["zgraph.cross_entropy_backward"] = _plain_loss_scratch
_LIBRARY.impl("rows", _rows(reference.run), "CPU")
_LIBRARY.impl("rows", _rows(kernels.launch), "CUDA")
torch.library.register_fake("zgraph::rows", _rows_fake, lib=_LIBRARY)
_LIBRARY.impl("compiled", _rows(_compiled), "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::compiled", _rows_fake, lib=_LIBRARY)
_LIBRARY.impl("matmul", _matmul(matmul.run_reference), "CPU")
_LIBRARY.impl("matmul", _matmul(matmul.launch), "CUDA")
torch.library.register_fake("zgraph::matmul", _matmul_fake, lib=_LIBRARY)
_LIBRARY.impl("rotary", rotary.run_reference, "CPU")
_LIBRARY.impl("rotary", rotary.launch, "CUDA")
torch.library.register_fake("zgraph::rotary", _rotary_fake, lib=_LIBRARY)
_LIBRARY.impl("seed", _seed, "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::seed", _seed_fake, lib=_LIBRARY)
_LIBRARY.impl("cross_entropy", loss.cross_entropy, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_entropy_backward", loss.cross_entropy_backward, "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::cross_entropy", _plain_loss_fake, lib=_LIBRARY)
torch.library.register_fake("zgraph::cross_entropy_backward", _plain_loss_backward_fake, lib=_LIBRARY)
_LIBRARY.impl("linear_cross_entropy", loss.linear_cross_entropy, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cross_entropy_backward", loss.linear_cross_entropy_backward, "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::linear_cross_entropy", _loss_fake, lib=_LIBRARY)
torch.library.register_fake("zgraph::linear_cross_entropy_backward", _loss_backward_fake, lib=_LIBRARY)
_LIBRARY.impl("to_float8", float8.to_float8_in_pieces, "CompositeExplicitAutograd")
_LIBRARY.impl("float8_mm", float8.float8_mm, "CompositeExplicitAutograd")
private_inductor.spell(torch.ops.zgraph.to_float8.default, float8.to_float8)
private_inductor.spell(torch.ops.zgraph.float8_mm.default, float8.float8_mm)
private_inductor.spell(torch.ops.zgraph.to_int8.default, quantised.to_int8)
private_inductor.spell(torch.ops.zgraph.int8_mm.default, quantised.int8_mm)
torch.library.register_fake("zgraph::to_float8", float8.fake_to_float8, lib=_LIBRARY)
torch.library.register_fake("zgraph::float8_mm", float8.fake_float8_mm, lib=_LIBRARY)
_INTEGERS = "to_int8", "int8_mm", "int8_linear", "int8_embedding", "to_int4", "pack_int4", "int4_mm", "int4_linear"
for _name in _INTEGERS:
    _LIBRARY.impl(_name, getattr(quantised, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zgraph::{_name}", getattr(quantised, f"fake_{_name}"), lib=_LIBRARY)
