"""Matmuls in float8: the numbers of torchao's recipes bit for bit, bounds against float64, and what stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.bridge import float8 as parts
from zgraph.certify.certificate import certify
from zgraph.certify.float8 import faults
from zgraph.codegen import float8
from zgraph.codegen import library as _ops  # noqa: F401 - registers the ops
from zgraph.errors import UsageError, VerifyError
from zgraph.ir import Axis, Graph, Node, Phase, parse_graph, print_graph
from zgraph.ir.external_ops import FLOAT8, FLOAT8_MM
from zgraph.passes import Context, parse_recipe
from zgraph.passes.float8 import Float8
from zgraph.passes.float8_gathers import Float8Gathers

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# --- torchao's recipes, written again in plain torch ------------------------------------------------------------


def scaled(x: torch.Tensor, dtype: torch.dtype, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8, and the inverse of its scale: along `dim` powers of two, else one in all."""
    largest = x.abs().max() if dim is None else x.abs().float().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.to(torch.float64).clamp(min=1e-12)).to(torch.float32)
    if dim is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    limit = torch.finfo(dtype).max
    return (x.to(torch.float32) * scale).clamp(-limit, limit).to(dtype), scale.reciprocal()


def product(
    a: torch.Tensor, b: torch.Tensor, dtypes: tuple[torch.dtype, torch.dtype], fast: bool, rows: bool
) -> torch.Tensor:
    left, left_scale = scaled(a, dtypes[0], 1 if rows else None)
    right, right_scale = scaled(b, dtypes[1], 0 if rows else None)
    dtype = torch.bfloat16 if rows else a.dtype
    assert fast or not rows
    return (left.float() @ right.float() * (left_scale * right_scale)).to(dtype).to(a.dtype)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return product(x, weight.t(), (E4M3, E4M3), True, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        kinds = (E4M3 if ctx.rows else E5M2, E4M3)
        back = product(gradient, weight, kinds, ctx.rows, ctx.rows)
        return back, product(gradient.t(), x, kinds, ctx.rows, ctx.rows), None


class Plain(nn.Module):
    """A linear layer by the recipe."""

    def __init__(self, layer: nn.Linear, rows: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.rows = layer.weight, layer.bias, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.rows).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class Net(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64, bias=False), nn.Linear(64, width)
        self.third, self.lm_head = nn.Linear(width, 32), nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.first(x))
        return self.lm_head(self.third(nn.functional.gelu(self.second(hidden))))


def trained(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, its loss, and all gradients."""
    out = model(x)
    loss = out.float().square().mean()
    loss.backward()
    return [out.detach(), loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", ["float8", "float8-rowwise"])
def test_numbers_are_those_of_the_recipe(compute: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Net().to(dtype)
    plain = copy.deepcopy(model)
    for name in ("first", "second", "third"):
        setattr(plain, name, Plain(getattr(plain, name), compute != "float8"))
    x = torch.randn(4, 16, 32, dtype=dtype)
    wanted = trained(plain, x)
    order = [name for name, _ in plain.named_parameters()]
    compiled = zgraph.compile(model, stage=0, compute=compute)
    out = trained(compiled, x)
    found = dict(zip((n for n, _ in compiled.named_parameters()), out[2:], strict=True))
    assert torch.equal(out[0], wanted[0])
    assert torch.equal(out[1], wanted[1])
    for name, gradient in zip(order, wanted[2:], strict=True):
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_is_as_near_as_the_dtype_allows(dtype: torch.dtype, dim: int | None) -> None:
    """Half a unit in the last place of normal numbers, and of the smallest for what is less; zeros stay."""
    x = torch.randn(64, 48) * torch.logspace(-6, 6, 64)[:, None]
    x[3] = 0.0
    data, scale = float8.to_float8(x, dtype, dim)
    bits = torch.finfo(dtype)
    found, wanted = data.double() / scale.double(), x.double()
    bound = wanted.abs() * bits.eps / 2 + bits.smallest_normal * bits.eps / 2 / scale.double()
    assert bool(((found - wanted).abs() <= bound * (1 + 1e-6)).all())
    assert not data[3].double().any()


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("shape", [(16, 16), (100, 48), (3, 2000)])
def test_pieces_are_the_whole(shape: tuple[int, int], dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "PIECE", 256)
    x = torch.randn(shape).t().contiguous().t()
    for whole, pieces in zip(float8.to_float8(x, E4M3, dim), float8.to_float8_in_pieces(x, E4M3, dim), strict=True):
        assert torch.equal(whole.float(), pieces.float())


@pytest.mark.parametrize("dim", [None, 1])
def test_a_product_is_torchs_own(dim: int | None) -> None:
    """What processors emulate, beside the op that GPUs run; on processors that is slow."""
    a, b = torch.randn(32, 64), torch.randn(16, 64)
    (left, left_scale), (right, right_scale) = (float8.to_float8(t, E4M3, dim) for t in (a, b))
    right, right_scale = right.t(), right_scale.t() if dim else right_scale
    ours = float8.float8_mm(left, left_scale, right, right_scale, torch.bfloat16, True)
    scales = left_scale.reciprocal(), right_scale.reciprocal()
    try:
        theirs = torch._scaled_mm(left, right, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch multiplies no float8 on processors: {error}")
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    exact = (left.double() / left_scale) @ (right.double() / right_scale)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("compute", ["float8", "float8-rowwise"])
def test_a_step_against_float64(compute: str) -> None:
    """Gradients are within a few roundings of float8 of what they are, and not within one of bfloat16."""
    torch.manual_seed(0)
    torch.compiler.reset()
    exact = Net().double()
    compiled = zgraph.compile(copy.deepcopy(exact).float(), stage=0, compute=compute)
    x = torch.randn(8, 16, 32)
    found, wanted = trained(compiled, x), trained(exact, x.double())
    for ours, theirs in zip(found, wanted, strict=True):
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error < 3 * 2**-4
    assert float((found[2].double() - wanted[2]).norm() / wanted[2].norm()) > 2**-8


def test_layers_that_stay_are_named() -> None:
    torch.compiler.reset()
    model = zgraph.compile(Net(width=40), stage=0, compute="float8")
    trained(model, torch.randn(4, 16, 32))
    said = str(zgraph.report(model))
    assert "float8" in said
    for word in ("1 of 4 linear layers", "second", "third", "40 is no multiple of 16", "lm_head", "excluded by name"):
        assert word in said


def captured(width: int = 48) -> Graph:
    torch.compiler.reset()
    return zgraph.trace(Net(width).bfloat16(), torch.randn(4, 16, 32, dtype=torch.bfloat16))


def test_three_products_a_layer_and_none_of_those_that_stay() -> None:
    graph = captured()
    found = Float8().run(graph, Context())
    made = [n for n in found.nodes if n.op == FLOAT8_MM]
    assert {n.origin.module for n in made} == {"first", "second", "third"}
    assert len(made) == 8  # the input needs no gradient
    assert sum(n.phase is Phase.forward for n in made) == 3
    assert Float8(exclude="second+third").layers(graph) == ["first", "lm_head"]
    assert Float8(exclude="first+second+third+lm_head").run(graph, Context()) is graph
    assert parse_graph(print_graph(found)) == found


def test_sizes_that_change_stay() -> None:
    torch.compiler.reset()
    graph = zgraph.trace(Net(), torch.randn(7, 32))
    assert set(Float8().left_out(graph).values()) == {"7 is no multiple of 16", "excluded by name"}


def changed(graph: Graph, change: Callable[[Node], Node]) -> Graph:
    return graph.with_nodes([change(n) for n in graph.nodes])


def other_scale(node: Node) -> Node:
    if node.op != FLOAT8_MM:
        return node
    a, _, b, b_scale, *rest = node.args
    return replace(node, args=(a, b_scale, b, b_scale, *rest))


def other_dim(node: Node) -> Node:
    return replace(node, args=(*node.args[:2], 1 - node.args[2])) if node.op == FLOAT8 else node


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_certificate_holds_of_what_the_pass_makes(recipe: str) -> None:
    graph = captured()
    after = Float8(recipe).run(graph, Context())
    done = certify([("captured", graph), ("float8", after)], Context())
    assert any(c.rule == "float8 by what it approximates" for c in done.checked)


@pytest.mark.parametrize(
    ("change", "words"), [(other_scale, "is not the scale of"), (other_dim, "is not along the dim")]
)
def test_a_certificate_refuses_other_scales(change: Callable[[Node], Node], words: str) -> None:
    after = Float8("rowwise").run(captured(), Context())
    assert not [*faults(after)]
    assert words in next(message for _, message in faults(changed(after, change)))


def test_a_certificate_refuses_another_matrix() -> None:
    """The products of the first layer with those of the third's weight, which has other numbers."""
    torch.compiler.reset()
    square = nn.Sequential(nn.Linear(32, 32, bias=False), nn.SiLU(), nn.Linear(32, 32, bias=False))
    graph = zgraph.trace(square, torch.randn(16, 32))
    after = Float8().run(graph, Context())
    first, second = (i.value for i in graph.params)

    def swapped(node: Node) -> Node:
        return node.substitute({first.name: second}) if node.op == FLOAT8 else node

    certify([("captured", graph), ("float8", after)], Context())
    with pytest.raises(VerifyError, match="is not what the graph before it computes"):
        certify([("captured", graph), ("float8", changed(after, swapped))], Context())


def test_options_that_cannot_be() -> None:
    for options, words in (
        ({"compute": "float4"}, '"float8-rowwise" or None'),
        ({"compute": "float8", "passes": "canonicalize,dce"}, "put float8 behind canonicalize"),
        ({"compute": "float8", "fullgraph": "eager"}, "captures nothing"),
    ):
        with pytest.raises(UsageError, match=words):
            zgraph.compile(Net(), **options)
    with pytest.raises(ValueError, match="tensorwise or rowwise"):
        Float8("blockwise")


def test_an_old_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    float8.float8_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 8.0" in float8.float8_problem(torch.device("cuda", 7))
    float8.float8_problem.cache_clear()


def test_recipes_as_text() -> None:
    assert str(parse_recipe("float8(recipe=rowwise, exclude=lm_head+router)")).startswith("float8(recipe=rowwise")


# --- gathers ----------------------------------------------------------------------------------------------------


def gathered() -> tuple[Graph, Graph]:
    """A graph of two ranks whose weights are gathered in full, and in float8."""
    torch.compiler.reset()
    square = nn.Sequential(nn.Linear(32, 32, bias=False), nn.SiLU(), nn.Linear(32, 32, bias=False))
    context = Context(mesh=(Axis("shard", 2),))
    captured = zgraph.trace(square, torch.randn(16, 32))
    full = parse_recipe("canonicalize,float8,partition(stage=3)").run(captured, context)
    return full, Float8Gathers().run(full, context)


def sent_bytes(graph: Graph) -> int:
    """Bytes of the wholes that its gathers move."""
    gathers = (n for n in graph.nodes if n.op == "reshard" and n.operands[0].tensor.is_sharded)
    return sum(math.prod(v.tensor.shape) * v.tensor.dtype.itemsize for n in gathers for v in n.operands)


def test_gathers_in_float8_send_a_quarter_of_fp32() -> None:
    """One weight of the two is gathered in the forward alone; and each has a largest magnitude on two ranks."""
    full, small = gathered()
    assert (sent_bytes(full), sent_bytes(small)) == (4 * 3 * 32 * 32, 3 * 32 * 32 + 2 * 2 * 4)


def of_the_first(graph: Graph, op: str, index: int) -> Graph:
    """The graph whose nodes of an op all read the operand of that number that the first of them does."""
    first = next(node for node in graph.nodes if node.op == op).operands[index]
    return changed(graph, lambda n: n.substitute({n.operands[index].name: first}) if n.op == op else n)


@pytest.mark.parametrize(("op", "index"), [("amax", 0), ("float8_scale", 0), ("float8_cast", 1), ("float8_cast", 0)])
def test_a_certificate_refuses_another_scale_or_weight(op: str, index: int) -> None:
    """What belongs to the first weight, in the place of the second's."""
    full, small = gathered()
    context = Context(mesh=(Axis("shard", 2),))
    certify([("partition", full), ("float8-gathers", small)], context)
    with pytest.raises(VerifyError, match="is not what the graph before it computes"):
        certify([("partition", full), ("float8-gathers", of_the_first(small, op, index))], context)


@pytest.mark.parametrize("numbers", [[0.0, -0.0], [-3.0, 2.0], [float("-inf"), 1.0], [1.0, float("nan")]])
def test_the_largest_magnitude_of_a_part(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.bfloat16)
    torch.testing.assert_close(parts.largest(x), x.abs().amax().float().view(1), equal_nan=True, rtol=0, atol=0)


def test_parts_are_cast_as_the_whole_is() -> None:
    x = torch.randn(1000) * torch.logspace(-8, 3, 1000)
    scale = parts.scale_of(parts.largest(x).amax(), E4M3)
    pieces = torch.cat([parts.cast_in_pieces(part, scale, E4M3).float() for part in x.split(300)])
    data, whole = float8.to_float8(x.view(10, 100), E4M3, None)
    assert torch.equal(scale, whole)
    assert torch.equal(pieces, data.float().view(-1))
