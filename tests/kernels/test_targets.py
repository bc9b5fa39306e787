"""Every kernel compiles for GPUs that are not here, and spills nothing in its default tiles."""

import json
import os
import sys
from collections.abc import Iterator
from subprocess import PIPE, Popen

import pytest

from tests.deep import deep
from zgraph.codegen.targets import TARGETS
from zgraph.optim.flat import COLUMNS

from .captured import of_demo, of_llama_8b
from .specs import SPECS, UPDATES


@pytest.mark.parametrize("columns", [64, 8192])
def test_kernels_compile_without_spills(columns, compiler):
    check(compiler, [str(make(columns, "bf16")) for name, make in SPECS.items() if name not in UPDATES])


def test_the_kernels_of_optimizers_compile_without_spills(compiler):
    check(compiler, [str(make(columns, "bf16")) for make in UPDATES.values() for columns in (1, COLUMNS)])


def test_kernels_that_sweep_over_rows_compile_without_spills(compiler):
    specs = [make(columns, "bf16") for make in SPECS.values() for columns in (16_384, 128_256)]
    check(compiler, [str(spec) for spec in specs if spec.is_looped])


@pytest.mark.parametrize("captured", [of_demo, deep(of_llama_8b)])
def test_the_kernels_of_captured_models_compile_without_spills(captured, compiler):
    """Matmuls with their epilogues, too."""
    kernels = captured()
    assert len(kernels) > 5
    assert sum(spec.is_epilogue for spec in kernels.values()) >= 2
    check(compiler, list(kernels))


def test_rotary_kernels_compile_without_spills(compiler):
    """Rows as wide as Llama-3's, GPT-NeoX's and Gemma's."""
    check(
        compiler, ["rotary 128 of 128", "rotary_backward 128 of 128", "rotary_backward 32 of 128", "rotary 256 of 256"]
    )


def test_kernels_of_codecs_compile_without_spills(compiler):
    codecs = (
        "q8(block=256)",
        "q4(block=128)",
        "q2(block=128)",
        "sign(block=256)",
        "q8(block=8)",
        "q4(block=8192)",
        "sign(block=8192)",
    )
    check(compiler, [f"{way} {codec}" for codec in codecs for way in ("encode", "decode")])


EPILOGUES = (
    "mm_bias_gelu 4096: acc f32[M,N], x0 bf16[N] -> v0 bf16[M,N], v6 bf16[M,N]; v0 = add(acc, x0); "
    "v1 = mul(v0, 0.7071); v2 = erf(v1); v3 = add(v2, 1.0); v4 = mul(v0, 0.5); v6 = mul(v4, v3)",
    "mm_residual 4096: acc f32[M,N], x0 bf16[M,N] -> v0 bf16[M,N]; v0 = add(acc, x0)",
    "mm_relu 1000: acc f32[M,N] -> v0 bf16[M,N]; v0 = maximum(acc, 0.0)",
)


def test_matmuls_compile_without_spills(compiler):
    """By hand, of kinds that Llama-3 8B has none of."""
    check(compiler, [*EPILOGUES])


@pytest.fixture(scope="module")
def compiler() -> Iterator[Popen[str]]:
    """A process of its own, as triton must not be in its interpreter: a line of its input is a kernel to compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "zgraph.codegen.targets"]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as process:
        yield process


def check(compiler: Popen[str], specs: list[str]) -> None:
    found = []
    for spec in specs:
        print(spec, file=compiler.stdin, flush=True)
        found += [json.loads(compiler.stdout.readline()) for _ in TARGETS]
    assert {row["target"] for row in found} == set(TARGETS)
    assert all(row["num_registers"] > 0 for row in found)
    assert [row for row in found if row["spill_bytes"]] == []
