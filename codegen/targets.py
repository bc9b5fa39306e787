"""Kernels compiled for GPUs that are not here, with the registers, shared memory and spills that they take.

echo "neg 64: x f32[M,N] -> y f32[M,N]; y = neg(x)" | python -m zgraph.codegen.targets sm_90 gfx942
echo "rotary 128 of 128" | python -m zgraph.codegen.targets
echo "encode q8(block=256)" | python -m zgraph.codegen.targets
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zgraph.codegen import codes, matmul, rotary
from zgraph.codegen.codes import CodeKernel
from zgraph.codegen.kernels import Tiles, load, tiles
from zgraph.codegen.matmul import MatmulTiles
from zgraph.codegen.rotary import Rotary
from zgraph.codegen.spec import ACC, KernelSpec
from zgraph.errors import KernelError
from zgraph.ir import DType

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

_POINTERS = {
    DType.f64: "*fp64",
    DType.f32: "*fp32",
    DType.f16: "*fp16",
    DType.bf16: "*bf16",
    DType.i64: "*i64",
    DType.i32: "*i32",
    DType.u8: "*u8",
    DType.bool: "*i1",
}

_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    """Resources that one program of a kernel uses.

    Args:
        kernel: its name.
        target: the GPU.
        num_registers: of one thread.
        shared_bytes: of one program.
        spill_bytes: written to memory for want of registers, in one thread.
    """

    kernel: str
    target: str
    num_registers: int
    shared_bytes: int
    spill_bytes: int


Kernel = KernelSpec | Rotary | CodeKernel


def parse(text: str) -> Kernel:
    """The kernel over rows, the epilogue of a matmul, the rotary kernel or that of a codec, which a text writes."""
    if ":" in text:
        return KernelSpec.parse(text)
    return Rotary.parse(text) if text.startswith("rotary") else CodeKernel.parse(text)


def resources(spec: Kernel, target: str) -> Resources:
    """Compile a kernel for a GPU.

    Args:
        spec: the kernel; a rotary one, and what a matmul multiplies, in bf16; numbers that are coded in fp32.
        target: `sm_80`, `sm_90` or `gfx942`.

    Raises:
        KernelError: there is no such target.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise KernelError(f"no target is called {target!r}; they are {', '.join(TARGETS)}")
    if isinstance(spec, KernelSpec):
        found = _matmul(spec, target) if spec.is_epilogue else _rows(spec)
    else:
        found = _rotary(spec) if isinstance(spec, Rotary) else _codes(spec)
    signature = found.arguments | dict.fromkeys(found.sizes, "constexpr")
    made = triton.compile(
        ASTSource(found.function, signature, found.sizes, found.aligned),
        target=GPUTarget(*TARGETS[target]),
        options=found.options,
    )
    num_registers, spill_bytes = _of_hip(made) if target.startswith("gfx") else _of_cuda(made, target)
    return Resources(spec.name, target, num_registers, made.metadata.shared, spill_bytes)


@dataclass(frozen=True)
class _Compiled:
    """Input of one compilation by Triton.

    Args:
        function: the kernel.
        arguments: the types of its arguments.
        sizes: its constants.
        options: warps and stages.
        has_even_sizes: numbers among its arguments are multiples of 16, as pointers always are.
    """

    function: Any
    arguments: dict[str, str]
    sizes: dict[str, int]
    options: dict[str, int]
    has_even_sizes: bool = False

    @property
    def aligned(self) -> dict[tuple[int], list[list[str | int]]]:
        """Alignment that Triton may assume of each argument, by its position."""
        kinds = enumerate(self.arguments.values())
        return {
            (at,): [["tt.divisibility", 16]] for at, k in kinds if k[0] == "*" or (k == "i32" and self.has_even_sizes)
        }


def _rows(spec: KernelSpec) -> _Compiled:
    cut = tiles(spec)
    arguments = {**_pointers(spec), "num_rows": "i32"}
    return _Compiled(load(spec), arguments, _blocks(cut), {"num_warps": cut.num_warps})


def _pointers(spec: KernelSpec) -> dict[str, str]:
    """The types of what a kernel over rows, or an epilogue, reads and writes."""
    found = {f"{o.name}_in": _POINTERS[o.dtype] for o in spec.inputs if o.name != ACC}
    return found | {f"{o.name}_out": "*fp32" if o.name in spec.row_sums else _POINTERS[o.dtype] for o in spec.outputs}


def _rotary(spec: Rotary) -> _Compiled:
    function, cut = rotary.load(spec), spec.tiles
    pointers = {name: _POINTERS[DType.bf16] for name in function.arg_names if name.endswith(("_in", "_out"))}
    arguments = {**dict.fromkeys(function.arg_names, "i32"), **pointers}
    return _Compiled(function, arguments, _blocks(cut), {"num_warps": cut.num_warps})


def _codes(spec: CodeKernel) -> _Compiled:
    """With feedback, where it codes."""
    function, types = codes.load(spec), {"code": _POINTERS[DType.u8]}
    sizes = {name: spec.codec.block if name == "BLOCK" else 1 for name in function.arg_names if name.isupper()}
    arguments = dict.fromkeys(function.arg_names, "i32")
    for name in function.arg_names:
        what, _, way = name.rpartition("_")
        if way in ("in", "out", "io"):
            arguments[name] = types.get(what, _POINTERS[DType.f32])
    return _Compiled(function, arguments, sizes, {"num_warps": spec.num_warps})


def _matmul(spec: KernelSpec, target: str) -> _Compiled:
    """Of matrices in bf16; the left one lies row by row, the right one column by column, as weights do."""
    function, itemsize = matmul.load(spec), DType.bf16.itemsize
    cut = matmul.tiles(spec, itemsize, is_hip=target.startswith("gfx"))
    matrices = {"left_in": _POINTERS[DType.bf16], "right_in": _POINTERS[DType.bf16]}
    arguments = {**dict.fromkeys(function.arg_names[:-4], "i32"), **matrices, **_pointers(spec)}
    sizes = {**_blocks(cut), "BLOCK_K": cut.block_k, "GROUP_M": matmul.GROUP_M, "left_inner": 1, "right_inner": 1}
    for name in ("left_inner", "right_inner"):
        arguments[name] = "constexpr"
    return _Compiled(function, arguments, sizes, {"num_warps": cut.num_warps, "num_stages": cut.num_stages}, True)


def _blocks(cut: Tiles | MatmulTiles) -> dict[str, int]:
    return {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}


def _of_hip(made: Any) -> tuple[int, int]:
    """Registers of one thread and its spilled bytes, from the metadata that AMD's assembler writes."""
    text = made.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))


def _of_cuda(made: Any, target: str) -> tuple[int, int]:
    """Registers of one thread and its spilled bytes, from what ptxas prints for the kernel's PTX."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(made.asm["ptx"])
        arch = f"{target}a" if target == "sm_90" else target
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(path), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = _USED.search(said), _SPILLED.search(said)
    return int(used[1]) if used else 0, int(spilled[1]) + int(spilled[2]) if spilled else 0


def main() -> None:
    """Read specs, one a line; write the resources that each takes on each target, one line of JSON each."""
    for line in sys.stdin:
        for target in sys.argv[1:] or TARGETS:
            print(json.dumps(asdict(resources(parse(line.strip()), target))), flush=True)


if __name__ == "__main__":
    main()
