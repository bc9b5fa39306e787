"""Matmuls with their epilogue, in Triton's interpreter, against float64."""

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from zgraph.bridge.aten import FROM_TORCH, TO_TORCH
from zgraph.codegen import library, matmul, reference
from zgraph.codegen.matmul import MatmulTiles
from zgraph.codegen.spec import ACC, KernelSpec

from .captured import of_small_models
from .specs import EPILOGUES, epilogue

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def operands(spec: KernelSpec, num_rows: int, dice: torch.Generator) -> list[torch.Tensor]:
    found = []
    for operand in (o for o in spec.inputs if o.name != ACC):
        shape, dtype = operand.extent.shape((num_rows,), spec.columns), TO_TORCH[operand.dtype]
        found.append(torch.tensor(77) if dtype is torch.int64 else torch.randn(shape, generator=dice).to(dtype))
    return found


def exact(spec: KernelSpec, a: torch.Tensor, b: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    product = a.double() @ b.double()
    return reference.run(spec, [product, *inputs], product.numel() // spec.columns, torch.float64)


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch):
    """Small tiles, so that small matrices have several, with edges; what is not written is not a number."""
    empty = torch.empty
    monkeypatch.setattr(matmul, "tiles", lambda *_, **__: MatmulTiles(16, 16, 16, 1, 1))
    monkeypatch.setattr(matmul.torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(torch.nan))
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


def widened(block: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """A block in fp32: the interpreter (triton 3.7) keeps bf16 as its bits, and would multiply those."""
    if block.dtype.scalar != tl.bfloat16:
        return block
    return interpreter.TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
@pytest.mark.parametrize("name", EPILOGUES)
@given(
    batch=st.sampled_from([(), (3,)]),
    rows=st.integers(0, 40),
    inner=st.integers(1, 40),
    columns=st.integers(1, 40),
    turned=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None)
def test_a_matmul_and_its_epilogue(name, dtype, batch, rows, inner, columns, turned, seed):
    dice = torch.Generator().manual_seed(seed)
    spec = epilogue(name, columns, FROM_TORCH[dtype].value)
    a, b = (
        torch.randn(*batch, *(shape[::-1] if turn else shape), generator=dice).to(dtype)
        for shape, turn in zip(((rows, inner), (inner, columns)), turned, strict=True)
    )
    a, b = (t.mT if turn else t for t, turn in zip((a, b), turned, strict=True))
    num_rows = rows * (batch[0] if batch else 1)
    inputs = operands(spec, num_rows, dice)
    wanted = exact(spec, a, b, inputs)
    made, plain = matmul.launch(spec, a, b, inputs), matmul.run_reference(spec, a, b, inputs)
    for output, got, same, true in zip(spec.outputs, made, plain, wanted, strict=True):
        assert got.dtype == same.dtype == TO_TORCH[output.dtype]
        floor = 1e-2 * true.numel() ** 0.5
        for found in (got, same):
            assert float((found.double().view(true.shape) - true).norm()) <= TOLERANCE[dtype] * (
                float(true.norm()) + floor
            )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_those_of_captured_steps():
    """Kernels that the pass makes of Llama, ViT, T5 and GPT-2, at sizes that end within a tile."""
    found = [spec for spec in of_small_models().values() if spec.is_epilogue]
    assert len(found) > 10
    for spec in found:
        dice = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if any(o.dtype.value == "bf16" for o in spec.outputs) else torch.float32
        a, b = torch.randn(5, 19, generator=dice).to(dtype), torch.randn(19, spec.columns, generator=dice).to(dtype)
        inputs = operands(spec, 5, dice)
        for output, got, true in zip(
            spec.outputs, matmul.launch(spec, a, b, inputs), exact(spec, a, b, inputs), strict=True
        ):
            limit = TOLERANCE[TO_TORCH[output.dtype]]
            assert float((got.double() - true).norm()) <= limit * (float(true.norm()) + 0.1), str(spec)


def test_what_traces_torch_sees_through_the_op():
    text = "mm 9: acc f32[M,N], x0 f32[N] -> y bf16[M,N], s f32[N]; y = add(acc, x0); s = col_sum(y)"
    with torch.device("meta"):
        a, b, bias = torch.empty(2, 3, 4), torch.empty(2, 4, 9), torch.empty(9)
        made, summed = torch.ops.zgraph.matmul(a, b, [bias], text)
    assert (made.shape, made.dtype, summed.shape) == ((2, 3, 9), torch.bfloat16, (9,))
    assert library.REGISTERED["zgraph.matmul"]


def test_blocks_are_narrower_where_more_is_alive():
    few, many = epilogue("plain", 64, "bf16"), epilogue("gate", 64, "bf16")
    assert matmul.most_alive(few) <= matmul.MAX_LIVE < matmul.most_alive(many)
