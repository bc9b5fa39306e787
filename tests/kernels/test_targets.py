"""Every kernel compiles for GPUs that are not here, and spills nothing in its default tiles."""

import json
import os
import subprocess
import sys

import pytest

from zgraph.codegen.targets import TARGETS
from zgraph.optim.flat import COLUMNS

from .captured import of_demo, of_llama_8b
from .specs import SPECS, UPDATES


@pytest.mark.parametrize("columns", [64, 8192])
def test_kernels_compile_without_spills(columns):
    check([str(make(columns, "bf16")) for name, make in SPECS.items() if name not in UPDATES])


def test_the_kernels_of_optimizers_compile_without_spills():
    check([str(make(columns, "bf16")) for make in UPDATES.values() for columns in (1, COLUMNS)])


def test_kernels_that_sweep_over_rows_compile_without_spills():
    specs = [make(columns, "bf16") for make in SPECS.values() for columns in (16_384, 128_256)]
    check([str(spec) for spec in specs if spec.is_swept])


@pytest.mark.parametrize("captured", [of_demo, of_llama_8b])
def test_the_kernels_of_captured_models_compile_without_spills(captured):
    """Matmuls with their epilogues, too."""
    kernels = captured()
    assert len(kernels) > 5
    assert sum(spec.is_epilogue for spec in kernels.values()) >= 2
    check(list(kernels))


def test_rotary_kernels_compile_without_spills():
    """Rows as wide as Llama-3's, GPT-NeoX's and Gemma's."""
    check(["rotary 128 of 128", "rotary_backward 128 of 128", "rotary_backward 32 of 128", "rotary 256 of 256"])


EPILOGUES = (
    "mm_bias_gelu 4096: acc f32[M,N], x0 bf16[N] -> v0 bf16[M,N], v6 bf16[M,N]; v0 = add(acc, x0); "
    "v1 = mul(v0, 0.7071); v2 = erf(v1); v3 = add(v2, 1.0); v4 = mul(v0, 0.5); v6 = mul(v4, v3)",
    "mm_residual 4096: acc f32[M,N], x0 bf16[M,N] -> v0 bf16[M,N]; v0 = add(acc, x0)",
    "mm_relu 1000: acc f32[M,N] -> v0 bf16[M,N]; v0 = maximum(acc, 0.0)",
)


def test_matmuls_compile_without_spills():
    """By hand, of kinds that Llama-3 8B has none of."""
    check([*EPILOGUES])


def check(specs: list[str]) -> None:
    """In a process of its own, as triton must not be in its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "zgraph.codegen.targets"], input="\n".join(specs), capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(specs) * len(TARGETS)
    assert all(row["num_registers"] > 0 for row in found)
    assert [row for row in found if row["spill_bytes"]] == []
