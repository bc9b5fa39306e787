"""Kernels on the machine: their source in a cache, one a file, loaded as a module and launched."""

from __future__ import annotations

import hashlib
import linecache
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.private_files import private_folder, read_private, write_private
from zgraph.codegen import reference
from zgraph.codegen.emit import source
from zgraph.codegen.fallback import launched
from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import KernelSpec, Operand
from zgraph.environment import cache_folder
from zgraph.errors import KernelError

BLOCK_NUMEL = 2048
"""Numbers that one program works on at a time, unless a single row has more."""

WARP_NUMEL = 256
"""Numbers that one warp works on at a time: 8 a thread, which of bf16 are one load of 16 bytes."""

MAX_WARPS = 16

MAX_COLUMNS = 1024
"""Columns of a program that needs no whole rows."""

MAX_PROGRAMS = 512
"""Programs that sum over rows: each writes a separate sum."""

MAX_GRID = (1 << 31) - 1, 65_535
"""The most programs along the first axis of a grid, and along the second, on GPUs of NVIDIA and AMD."""

REFERENCE_NUMEL = 1 << 24
"""Numbers that the reference works on at a time where it writes into memory that is given."""


def folder() -> Path:
    """Folder of the sources: a folder of this user alone.

    Raises:
        CacheError: it cannot be one.
    """
    return private_folder(cache_folder(), "kernels")


@cache
def load(spec: KernelSpec) -> Any:
    """The kernel as Triton has it. With TRITON_INTERPRET=1 in the environment it runs on processors, slowly."""
    return load_source(spec.name, source(spec))


def load_source(kernel: str, text: str) -> Any:
    """The kernel of this name in a module with this text.

    It is the text at hand that runs, and that Triton compiles. The file is for whoever reads it; one that is cut off,
    or holds anything else, is written anew.
    """
    held = text.encode()
    name = f"{kernel}_{hashlib.sha256(held).hexdigest()[:16]}"
    path = folder() / f"{name}.py"
    if read_private(path, len(held)) != held:
        write_private(path, held)
    linecache.cache[str(path)] = len(held), None, text.splitlines(keepends=True), str(path)  # None: never read again
    module = ModuleType(name)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return getattr(module, kernel)


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut into programs: rows and columns of each, and its warps."""

    block_m: int
    block_n: int
    num_warps: int


LOOPED = Tiles(1, 2048, 8)
"""Those of a kernel that loops over rows: 8 numbers a thread, 16 bytes in bf16. With few rows at a time, later loops
find them in the L2 cache."""

LOOPED_SUMS = Tiles(2, 2048, 8)
"""Those of one that sums over rows besides: it adds to its sums in memory once for each two rows."""


def tiles(spec: KernelSpec) -> Tiles:
    """The default tiles of a kernel."""
    if spec.is_looped:
        return LOOPED_SUMS if spec.row_sums else LOOPED
    least = -(-spec.columns // MAX_GRID[1])  # of so many columns the second axis of a grid counts all
    columns = spec.columns if spec.needs_whole_rows else max(min(spec.columns, MAX_COLUMNS), least)
    block_n = 1 << (columns - 1).bit_length()
    block_m = max(BLOCK_NUMEL // block_n, 1)
    return Tiles(block_m, block_n, min(max(block_m * block_n // WARP_NUMEL, 1), MAX_WARPS))


def launch(
    spec: KernelSpec, inputs: Sequence[torch.Tensor], num_rows: int, out: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Run a kernel.

    Args:
        spec: the kernel.
        inputs: its operands, dense, all on one device.
        num_rows: M.
        out: where to write, dense. An input may be written over where every number depends on its own place only. None
            makes new tensors.

    Returns:
        The outputs, shaped [M, N], [M, 1] or [N] by their extents; or `out`.

    Raises:
        KernelError: `out` does not fit.
    """
    if out is not None:
        _check_out(spec, out, num_rows)
    return launched(
        spec,
        lambda: _launch(spec, inputs, num_rows, out),
        lambda: _by_reference(spec, inputs, num_rows, out),
    )


def _launch(
    spec: KernelSpec, inputs: Sequence[torch.Tensor], num_rows: int, out: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    cut = tiles(spec)
    num_blocks = -(-num_rows // cut.block_m)
    num_programs = min(num_blocks, MAX_PROGRAMS) if spec.row_sums else num_blocks
    outs = empty(spec, num_rows, num_programs, inputs[0].device) if out is None else list(out)
    if num_programs:
        num_across = 1 if spec.needs_whole_rows else -(-spec.columns // cut.block_n)
        start(
            load(spec),
            (num_programs, num_across),
            *(t.contiguous() for t in inputs),
            *outs,
            num_rows,
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            num_warps=cut.num_warps,
        )
    return summed(spec, outs)


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: int) -> None:
    """Start a kernel on the device of its first operand, whichever device is current.

    Triton launches on the current device: a model on `cuda:3` would run on `cuda:0`, on memory that is not there.

    Raises:
        GridError: a GPU cannot count so many programs.
    """
    if any(count > most for count, most in zip(grid, MAX_GRID, strict=False)):
        raise GridError(f"a grid of {' x '.join(map(str, grid))} programs; a GPU takes {MAX_GRID[0]} x {MAX_GRID[1]}")
    device = args[0].device
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
            kernel[grid](*args, **options)


class GridError(RuntimeError):
    """A kernel has more programs than a GPU can count. Its reference runs in its place."""


def _by_reference(
    spec: KernelSpec, inputs: Sequence[torch.Tensor], num_rows: int, out: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    """The same by the reference. Into memory that is given it writes a few rows at a time, to need little besides."""
    if out is None:
        return reference.run(spec, inputs, num_rows)
    draws = any(step.op == "random" for step in spec.steps)  # by their place among all rows
    size = num_rows if draws else max(REFERENCE_NUMEL // spec.columns, 1)
    for begin in range(0, num_rows, size):
        count = min(size, num_rows - begin)
        made = reference.run(spec, [_rows(o, t, begin, count, spec) for o, t in _pairs(spec.inputs, inputs)], count)
        for (output, target), new in zip(_pairs(spec.outputs, out), made, strict=True):
            _rows(output, target, begin, count, spec).copy_(new)
    return list(out)


def _pairs(operands: Sequence[Operand], tensors: Sequence[torch.Tensor]) -> list[tuple[Operand, torch.Tensor]]:
    return list(zip(operands, tensors, strict=True))


def _rows(operand: Operand, tensor: torch.Tensor, begin: int, count: int, spec: KernelSpec) -> torch.Tensor:
    """These rows of an operand; all of one that has none."""
    if operand.extent in (Extent.full, Extent.column):
        width = spec.columns if operand.extent is Extent.full else 1
        return tensor.contiguous().view(-1, width)[begin : begin + count]
    return tensor


def empty(spec: KernelSpec, num_rows: int, num_sums: int, device: torch.device) -> list[torch.Tensor]:
    """Memory for what a kernel writes: of sums over rows, one from each of so many programs, in fp32."""
    return [
        torch.empty(num_sums, spec.columns, device=device)
        if output.name in spec.row_sums
        else torch.empty(output.extent.shape((num_rows,), spec.columns), dtype=TO_TORCH[output.dtype], device=device)
        for output in spec.outputs
    ]


def summed(spec: KernelSpec, outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a kernel, with the partial sums of its programs added up."""
    return [
        out.sum(0).to(TO_TORCH[output.dtype]) if output.name in spec.row_sums else out
        for output, out in zip(spec.outputs, outs, strict=True)
    ]


def _check_out(spec: KernelSpec, out: Sequence[torch.Tensor], num_rows: int) -> None:
    wanted = [(TO_TORCH[o.dtype], math.prod(o.extent.shape((num_rows,), spec.columns))) for o in spec.outputs]
    given = [(t.dtype, t.numel()) for t in out]
    if spec.row_sums or given != wanted or not all(t.is_contiguous() for t in out):
        raise KernelError(f"{spec.name} writes {wanted}, dense and no sums over rows, not {given}; leave out= away")


def can_launch(device: torch.device) -> bool:
    """Whether kernels run there: on GPUs, and on processors in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
