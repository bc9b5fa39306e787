"""Kernels compiled for GPUs that are not here, with the registers, shared memory and spills that they take.

echo "neg 64: x f32[M,N] -> y f32[M,N]; y = neg(x)" | python -m zgraph.codegen.targets sm_90 gfx942
echo "rotary 128 of 128" | python -m zgraph.codegen.targets
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

from zgraph.codegen import rotary
from zgraph.codegen.kernels import Tiles, load, tiles
from zgraph.codegen.rotary import Rotary
from zgraph.codegen.spec import KernelSpec
from zgraph.errors import KernelError
from zgraph.ir import DType

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

_POINTERS = {DType.f64: "*fp64", DType.f32: "*fp32", DType.f16: "*fp16", DType.bf16: "*bf16", DType.i64: "*i64",
             DType.i32: "*i32", DType.u8: "*u8", DType.bool: "*i1"}  # fmt: skip

_USED = re.compile(r"Used (\d+) registers")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes.

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


def parse(text: str) -> KernelSpec | Rotary:
    """The kernel over rows, or the rotary one, that a text writes."""
    return KernelSpec.parse(text) if ":" in text else Rotary.parse(text)


def resources(spec: KernelSpec | Rotary, target: str) -> Resources:
    """Compile a kernel for a GPU.

    Args:
        spec: the kernel; a rotary one in bf16.
        target: `sm_80`, `sm_90` or `gfx942`.

    Raises:
        KernelError: there is no such target.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise KernelError(f"no target is called {target!r}; they are {', '.join(TARGETS)}")
    function, signature, cut = _rotary(spec) if isinstance(spec, Rotary) else _rows(spec)
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    signature |= {"BLOCK_M": "constexpr", "BLOCK_N": "constexpr"}
    made = triton.compile(
        ASTSource(function, signature, {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n}, aligned),
        target=GPUTarget(*TARGETS[target]), options={"num_warps": cut.num_warps},
    )  # fmt: skip
    num_registers, spill_bytes = _of_hip(made) if target.startswith("gfx") else _of_cuda(made, target)
    return Resources(spec.name, target, num_registers, made.metadata.shared, spill_bytes)


def _rows(spec: KernelSpec) -> tuple[Any, dict[str, str], Tiles]:
    """What Triton compiles, the types of its arguments, and its tiles."""
    sums = {step.name for step in spec.row_sums}
    signature = {f"{o.name}_in": _POINTERS[o.dtype] for o in spec.inputs}
    signature |= {f"{o.name}_out": "*fp32" if o.name in sums else _POINTERS[o.dtype] for o in spec.outputs}
    return load(spec), {**signature, "num_rows": "i32"}, tiles(spec)


def _rotary(spec: Rotary) -> tuple[Any, dict[str, str], Tiles]:
    function = rotary.load(spec)
    pointers = {name: _POINTERS[DType.bf16] for name in function.arg_names if name.endswith(("_in", "_out"))}
    return function, {**dict.fromkeys(function.arg_names, "i32"), **pointers}, spec.tiles


def _of_hip(made: Any) -> tuple[int, int]:
    """What AMD's assembler writes into the kernel's metadata."""
    text = made.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))


def _of_cuda(made: Any, target: str) -> tuple[int, int]:
    """What the assembler for NVIDIA's GPUs says of the kernel's PTX."""
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
