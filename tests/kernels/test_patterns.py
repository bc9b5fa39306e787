"""In float64, each pattern is its op of torch, and each backward the gradient of its forward."""

from collections.abc import Mapping, Sequence

import pytest
import torch

from zgraph.bridge.aten import resolve
from zgraph.codegen import loss, reference
from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import KernelSpec, Operand, Step
from zgraph.ir import DType
from zgraph.passes.fusion.patterns import PATTERNS, Pattern

from .specs import rms_norm, rms_norm_backward

NUM_ROWS, COLUMNS = 3, 5

EXTENTS = {"w": Extent.row, "b": Extent.row, "m": Extent.column, "r": Extent.column, "seed": Extent.scalar}
"""Extents of arguments of patterns; others have rows and columns."""

NUMBERS = {"eps": 1e-5, "p": 0.25, "scale": 4 / 3, "per_kept": 4 / 3, "per_column": 1 / COLUMNS}

OPTIONS = {"input_dtype": torch.float64, "normalized_shape": [COLUMNS], "half_to_float": False, "keepdim": False}
"""Arguments that patterns do not look at, as torch wants them."""

ALL = [pattern for patterns in PATTERNS.values() for pattern in patterns]


def draws(pattern: Pattern) -> bool:
    return any(step.op == "random" for step in pattern.steps)


def spec_of(pattern: Pattern, numbers: Mapping[str, float] = NUMBERS) -> KernelSpec:
    """A pattern as a kernel that reads its arguments and writes its results."""
    read = {a for step in pattern.steps for a in step.args} - {step.name for step in pattern.steps}
    bound = {name: number for name, number in numbers.items() if name in read}
    inputs = [
        Operand(name, DType.i64 if name == "seed" else DType.f64, EXTENTS.get(name, Extent.full))
        for name in (*pattern.args, "seed")
        if name in read and name not in bound
    ]
    steps = tuple(Step(s.name, s.op, tuple(bound.get(a, a) for a in s.args)) for s in pattern.steps)
    extents = KernelSpec("k", COLUMNS, tuple(inputs), (inputs[0],), steps).extents
    outputs = tuple(Operand(name, DType.f64, extents[name]) for name in pattern.results)
    return KernelSpec("k", COLUMNS, tuple(inputs), outputs, steps)


def operands(spec: KernelSpec) -> list[torch.Tensor]:
    """Random operands around 1, where no op has a kink."""
    dice = torch.Generator().manual_seed(0)
    shapes = (operand.extent.shape((NUM_ROWS,), COLUMNS) for operand in spec.inputs)
    drawn = (torch.rand(shape, generator=dice, dtype=torch.float64) + 0.5 for shape in shapes)
    return [torch.tensor(7) if o.dtype is DType.i64 else t for o, t in zip(spec.inputs, drawn, strict=True)]


def run(spec: KernelSpec, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return reference.run(spec, inputs, NUM_ROWS, torch.float64)


@pytest.mark.parametrize("pattern", [p for p in ALL if not draws(p)], ids=lambda p: p.op)
def test_a_pattern_is_its_op(pattern):
    op = resolve(pattern.op)
    kinds = op._schema.arguments
    named = [a for a, kind in zip(pattern.args, kinds, strict=False) if str(kind.type) == "number" and a.isidentifier()]
    scalars = dict.fromkeys(named, 1.75)
    spec = spec_of(pattern, {**scalars, **NUMBERS})
    inputs = operands(spec)
    known = {**{o.name: t for o, t in zip(spec.inputs, inputs, strict=True)}, **NUMBERS, **scalars}
    args = [argument(wanted, kind, known) for wanted, kind in zip(pattern.args, kinds, strict=False)]
    wanted = op(*args, **pattern.keywords)
    for made, exact in zip(run(spec, inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert torch.allclose(made, exact.reshape(made.shape), rtol=1e-12, atol=1e-14)


def argument(wanted: str, kind: torch.Argument, known: Mapping[str, object]) -> object:
    """The value in the place of a pattern's argument."""
    if wanted in known:
        return known[wanted]
    words = {"last": [-1], "rows": [0], "true": True, "[true,true,true]": [True] * 3, "b": torch.ones(COLUMNS).double()}
    found = OPTIONS[kind.name] if wanted == "_" else words[wanted] if wanted in words else float(wanted)
    return found[0] if isinstance(found, list) and str(kind.type) == "int" else found


BACKWARDS = {
    "aten.silu.default": "aten.silu_backward.default",
    "aten.gelu.default": "aten.gelu_backward.default",
    "aten.sigmoid.default": "aten.sigmoid_backward.default",
    "aten.tanh.default": "aten.tanh_backward.default",
    "aten.relu.default": "aten.threshold_backward.default",
    "aten._softmax.default": "aten._softmax_backward_data.default",
    "aten._safe_softmax.default": "aten._softmax_backward_data.default",
    "aten._log_softmax.default": "aten._log_softmax_backward_data.default",
    "aten.native_layer_norm.default": "aten.native_layer_norm_backward.default",
    "aten.native_dropout.default": "aten.native_dropout_backward.default",
}

PAIRS = {
    f"{forward} {pattern.keywords}": (spec_of(pattern), spec_of(back))
    for forward, backward in BACKWARDS.items()
    for pattern, back in zip(PATTERNS[forward], PATTERNS[backward], strict=True)
} | {"rms_norm": (rms_norm(COLUMNS), rms_norm_backward(COLUMNS))}


def differentiable(forward: KernelSpec, backward: KernelSpec):
    """The first output of a kernel as a function of its operands, whose gradient another kernel makes.

    That is given `g`, the output as `y0`, a mask as `kept`, and what the forward reads and writes by its name there.
    """

    class Twin(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            made = run(forward, inputs)
            ctx.values = dict(zip((o.name for o in forward.inputs), inputs, strict=True))
            ctx.values.update(zip((o.name for o in forward.outputs), made, strict=True))
            return made[0]

        @staticmethod
        def backward(ctx, gradient):
            values = {**ctx.values, "g": gradient, "y0": ctx.values["y"], "kept": ctx.values.get("k")}
            made = run(backward, [values[o.name] for o in backward.inputs])
            return *made, *[None] * (len(forward.inputs) - len(made))

    return Twin.apply


@pytest.mark.parametrize("name", PAIRS)
def test_a_backward_is_the_gradient_of_its_forward(name):
    forward, backward = PAIRS[name]
    inputs = [t - 1 if t.ndim == 2 else t for t in operands(forward)]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    assert torch.autograd.gradcheck(differentiable(forward, backward), inputs)


def test_every_backward_has_its_forward():
    assert {op for op in PATTERNS if "backward" in op} == set(BACKWARDS.values())


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_gradient_of_a_loss(op, mean, monkeypatch):
    """Over several blocks of tokens or of classes."""
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * 2 * 7)
    monkeypatch.setattr(loss, "MULTIPLE", 3)
    dice = torch.Generator().manual_seed(0)
    shapes = [(4, 7)] if op == "cross_entropy" else [(4, 3), (7, 3)]
    inputs = [torch.randn(shape, generator=dice, dtype=torch.float64, requires_grad=True) for shape in shapes]
    target = torch.tensor([0, 6, -100, 3])

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            made, *kept = getattr(loss, op)(*given, target, -100, mean)
            ctx.saved = given, kept
            return made

        @staticmethod
        def backward(ctx, tangent):
            given, kept = ctx.saved
            return getattr(loss, f"{op}_backward")(tangent, *given, target, *kept, -100, mean)

    assert torch.autograd.gradcheck(Loss.apply, inputs)
