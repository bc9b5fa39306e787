"""Rotary embedding: its kernel in Triton's interpreter and its reference, against Hugging Face's formula in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import measure
from zgraph.bridge.aten import FROM_TORCH
from zgraph.codegen import library, rotary  # noqa: F401 - the library registers the op
from zgraph.codegen.rotary import Rotary
from zgraph.cost.workspace import NUM_THREADS, workspace_bytes
from zgraph.errors import KernelError
from zgraph.ir import Node, TensorType, Value
from zgraph.ir.external_ops import ROTARY

ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def rotated(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + rotated(turned) * sin, rest], -1)


def gradient(tangent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(tangent, requires_grad=True)
    return torch.autograd.grad(formula(x, cos, sin), x, tangent)[0]


def poisoned(*args, **kwargs) -> torch.Tensor:
    return torch.full(args[0], torch.nan, **kwargs)


@st.composite
def operands(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in some layout with gaps or without; angles the same in some dimensions, whose halves differ."""
    shape = [draw(st.integers(0, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 9))]
    half, rest = draw(st.integers(1, 20)), draw(st.integers(0, 50))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    wide = torch.randn(shape[0], shape[2], shape[1] + 1, 2 * half + rest + 3, generator=dice)
    strided = wide[:, :, 1:, 2 : 2 * half + rest + 2].transpose(1, 2)
    x = draw(st.sampled_from([strided, strided.contiguous()]))
    outer = [draw(st.sampled_from([1, d])) if d else 1 for d in shape]
    cos, sin = (torch.randn(*outer, 2 * half, generator=dice) for _ in range(2))
    return x, cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(given=operands(), order=st.sampled_from(ORDERS), back=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_kernel_and_its_twin_are_the_formula(dtype, given, order, back):
    x, cos, sin = (t.to(dtype) for t in given)
    exact = (gradient if back else formula)(x.double(), cos.double(), sin.double())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", poisoned)
        made = [run(x, cos, sin, order, back) for run in (rotary.launch, rotary.run_reference, torch.ops.zgraph.rotary)]
    for got in made:
        assert (got.shape, got.dtype) == (x.shape, dtype)
        assert got.permute(order).is_contiguous()
        assert float((got.double() - exact).norm()) <= LIMIT[dtype] * float(exact.norm())


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.ops.zgraph.rotary(x, cos, sin, [0, 2, 1, 3], False)

    @staticmethod
    def backward(ctx, tangent):
        return torch.ops.zgraph.rotary(tangent, *ctx.saved_tensors, [0, 1, 2, 3], True), None, None


def test_back_is_the_gradient():
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=dice, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, 5, 6, generator=dice, dtype=torch.float64)
    assert torch.autograd.gradcheck(Turned.apply, (x, cos, sin))


def test_what_traces_torch_sees_how_the_result_lies():
    x, angles = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(1, 1, 5, 8, device="meta")
    for order in ORDERS:
        made = torch.ops.zgraph.rotary(x, angles, angles, order, False)
        assert made.shape == x.shape
        assert made.permute(order).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
def test_what_the_twin_takes_is_known(dtype, back):
    """To the byte, of x in a dtype and angles in another."""
    x, angles = torch.randn(2, 4, 64, 32).to(dtype), torch.randn(1, 1, 64, 16).bfloat16()

    def prepare() -> Callable[[int], torch.Tensor]:
        return lambda step: torch.ops.zgraph.rotary(x, angles, angles, [0, 2, 1, 3], back)[:0, 0, 0, 0].clone()

    live = measure(prepare, warmup=1, device=torch.device("cpu"))
    value = [Value(n, TensorType(FROM_TORCH[t.dtype], tuple(t.shape))) for n, t in (("x", x), ("cos", angles))]
    node = Node(ROTARY, (*value, value[1], (0, 2, 1, 3), back), (Value("y", value[0].type),))
    assert live.peak_bytes - live.rest_bytes == x.nbytes + workspace_bytes(node, {NUM_THREADS: 1})


def test_the_source_can_be_read():
    kernel = Rotary.parse("rotary_backward 32 of 96")
    assert Rotary.parse(str(kernel)) == kernel
    assert rotary.load(kernel).arg_names[:4] == ["x_in", "cos_in", "sin_in", "y_out"]
    assert max(map(len, kernel.source.splitlines())) < 120


def test_what_does_not_fit():
    x, angles = torch.zeros(2, 3, 5, 8), torch.zeros(1, 1, 5, 8)
    for wrong in (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 5, 10)):
        with pytest.raises(KernelError, match="give"):
            torch.ops.zgraph.rotary(x, wrong, wrong, [0, 1, 2, 3], False)
    with pytest.raises(KernelError, match="as many dimensions"):
        rotary.launch(x, angles, angles[:, :, :1], [0, 1, 2, 3], False)
    with pytest.raises(KernelError, match="write `rotary"):
        Rotary.parse("rotary 32")
