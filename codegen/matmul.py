"""A matmul with what follows it in one kernel: `a @ b` stays in registers while the steps of the epilogue run on it.

The epilogue is a kernel over rows whose operand `acc` is the product, which is not loaded:

    mm_gelu 256: acc f32[M,N], x0 bf16[N] -> v6 bf16[M,N]; v0 = add(acc, x0); ...

Blocks of the product that lie below each other share columns of b, and run close to each other, so that they find those
in the cache (Tillet, Kung, Cox: "Triton: an intermediate language and compiler for tiled neural network computations",
2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from zgraph.codegen import emit, reference
from zgraph.codegen.fallback import launched
from zgraph.codegen.kernels import empty, load_source, start, summed
from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import ACC, KernelSpec, Operand

Tensor = torch.Tensor

GROUP_M = 8
"""Blocks below each other that run close to each other."""

MAX_LIVE = 2
"""Values of a block that are alive at once, above which blocks are half as wide: more do not fit the registers."""


@dataclass(frozen=True)
class MatmulTiles:
    """How a matmul is cut into programs: rows and columns of each, and what it reads at once of the inner size."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles(spec: KernelSpec, itemsize: int, *, is_hip: bool = False) -> MatmulTiles:
    """The default tiles of a matmul of operands with so many bytes an element."""
    block_k = (64 if not is_hip else 32) * 2 // itemsize
    return MatmulTiles(128, 64 if most_alive(spec) > MAX_LIVE else 128, max(block_k, 16), 8, 2 if is_hip else 3)


def most_alive(spec: KernelSpec) -> int:
    """The most values of a whole block that are alive at once."""
    alive = {o.name for o in spec.inputs if o.extent is Extent.full}
    most = len(alive)
    for step, frees in zip(spec.steps, spec.frees, strict=True):
        alive |= {step.name} if spec.extents[step.name] is Extent.full else set()
        most = max(most, len(alive))
        alive.difference_update(frees)
    return most


def source(spec: KernelSpec) -> str:
    """The module of a matmul with this epilogue.

    The kernel takes pointers to left [B, M, K], right [B, K, N], each operand of the epilogue but the product, and each
    output; M, K, and the strides of both. The only axis of the grid counts blocks of a product, then products: a second
    axis would end at 65,535. Each block of rows writes its own sum over rows; they are summed up afterwards.
    """
    return emit.module(spec, "a matmul, and its epilogue on rows", _kernel(spec))


def _kernel(spec: KernelSpec) -> Iterator[str]:
    pointers = [
        "left_in",
        "right_in",
        *(f"{o.name}_in" for o in _loaded(spec)),
        *(f"{o.name}_out" for o in spec.outputs),
    ]
    yield "@triton.jit"
    yield f"def {spec.name}("
    yield f"    {', '.join(pointers)}, num_rows, num_inner,"
    yield "    left_batch, left_row, left_inner, right_batch, right_inner, right_column,"
    yield "    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,"
    yield "):"
    yield from emit.indented(_PRODUCT.format(columns=spec.columns).splitlines())
    yield from emit.indented(_epilogue(spec))


_PRODUCT = """\
num_blocks = tl.cdiv(num_rows, BLOCK_M)
num_across = tl.cdiv({columns}, BLOCK_N)
in_product = tl.program_id(0) % (num_blocks * num_across)
group = in_product // (GROUP_M * num_across) * GROUP_M
num_together = tl.minimum(num_blocks - group, GROUP_M)
in_group = in_product % (GROUP_M * num_across)
block = group + in_group % num_together
batch = (tl.program_id(0) // (num_blocks * num_across)).to(tl.int64)
own_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
columns = in_group // num_together * BLOCK_N + tl.arange(0, BLOCK_N)
inner = tl.arange(0, BLOCK_K)
in_rows = own_rows < num_rows
in_row = columns < {columns}
left_at = left_in + batch * left_batch + own_rows.to(tl.int64)[:, None] * left_row + inner[None, :] * left_inner
right_at = right_in + batch * right_batch + inner[:, None] * right_inner
right_at += columns.to(tl.int64)[None, :] * right_column
acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
for first in range(0, num_inner, BLOCK_K):
    is_there = first + inner < num_inner
    left = tl.load(left_at, mask=in_rows[:, None] & is_there[None, :], other=0.0)
    right = tl.load(right_at, mask=is_there[:, None] & in_row[None, :], other=0.0)
    acc = tl.dot(left, right, acc, input_precision="ieee")
    left_at += BLOCK_K * left_inner
    right_at += BLOCK_K * right_inner
rows = batch * num_rows + own_rows
"""


def _epilogue(spec: KernelSpec) -> Iterator[str]:
    yield from emit.positions(spec)
    yield from map(emit.load, _loaded(spec))
    for step in spec.steps:
        if step.name in spec.row_sums:
            yield f"{step.name} = tl.zeros([BLOCK_N], tl.float32)"
        yield emit.line(step)
    for output in spec.outputs:
        if output.name in spec.row_sums:
            at = f"(batch * num_blocks + block) * {spec.columns} + columns"
            yield f"tl.store({output.name}_out + {at}, {output.name}, mask=in_row)"
        else:
            yield emit.store(output)


def _loaded(spec: KernelSpec) -> list[Operand]:
    return [o for o in spec.inputs if o.name != ACC]


@cache
def load(spec: KernelSpec) -> Any:
    """The kernel as Triton has it."""
    return load_source(spec.name, source(spec))


def launch(spec: KernelSpec, a: Tensor, b: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a matmul with its epilogue.

    Args:
        spec: the epilogue.
        a: [M, K] or [B, M, K], of any strides.
        b: [K, N] or [B, K, N], likewise.
        inputs: the operands of the epilogue but the product, dense.

    Returns:
        The outputs, shaped [B * M, N], [B * M, 1] or [N] by their extents.
    """
    return launched(("matmul", spec), lambda: _launch(spec, a, b, inputs), lambda: run_reference(spec, a, b, inputs))


def _launch(spec: KernelSpec, a: Tensor, b: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    left, right = (t if t.ndim == 3 else t[None] for t in (a, b))
    num_batches, num_rows, num_inner = left.shape
    cut = tiles(spec, a.element_size(), is_hip=torch.version.hip is not None)
    num_blocks = -(-num_rows // cut.block_m)
    outs = empty(spec, num_batches * num_rows, num_batches * num_blocks, a.device)
    if num_batches * num_blocks:
        start(
            load(spec),
            (num_blocks * -(-spec.columns // cut.block_n) * num_batches,),
            left,
            right,
            *(t.contiguous() for t in inputs),
            *outs,
            num_rows,
            num_inner,
            *left.stride(),
            *right.stride(),
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            BLOCK_K=cut.block_k,
            GROUP_M=GROUP_M,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )
    return summed(spec, outs)


def run_reference(spec: KernelSpec, a: Tensor, b: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same in torch, for processors; the product is rounded to the dtype of a and b there."""
    product = a @ b
    given = iter(inputs)
    operands = [product if o.name == ACC else next(given) for o in spec.inputs]
    return reference.run(spec, operands, product.numel() // spec.columns)


def scratch_bytes(spec: KernelSpec, num_rows: int, itemsize: int) -> int:
    """About the most bytes that the reference has alive at once, beside what it reads and what it writes."""
    return itemsize * num_rows * spec.columns + reference.scratch_bytes(spec, num_rows)
