"""Graphs of GPUs, captured here: torch's choice of attention there, its results, and that they can be interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import small
import zgraph
from zgraph.bridge.private_gpu import Capability, as_on_gpu, attention_on_gpu
from zgraph.cost.capability import capability_of
from zgraph.cost.hardware import hardware, known
from zgraph.errors import UnknownOpError
from zgraph.estimate.trace import traced
from zgraph.interpreter import Interpreter
from zgraph.ir import Graph, InputKind
from zgraph.passes import RECIPES, parse_recipe

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, HOPPER, VOLTA = (8, 0), (9, 0), (7, 0)


def qkv(dtype: torch.dtype = BF16, width: int = 16, heads: int = 4) -> tuple[torch.Tensor, ...]:
    dice = torch.Generator().manual_seed(0)
    shapes = [(2, h, 8, width) for h in (4, heads, heads)]
    return tuple(torch.randn(shape, generator=dice).to(dtype).requires_grad_() for shape in shapes)


def causal(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(8, 8, dtype=dtype).masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "masked", "kind"),
    [
        (AMPERE, BF16, 16, False, "flash"),
        (AMPERE, F16, 256, False, "flash"),
        (AMPERE, BF16, 264, False, "efficient"),
        (AMPERE, BF16, 16, True, "efficient"),
        (AMPERE, F32, 16, False, "efficient"),
        (AMPERE, F32, 18, False, "math"),
        (AMPERE, torch.float64, 16, False, "math"),
        (HOPPER, BF16, 16, False, "cudnn"),
        (HOPPER, BF16, 16, True, "cudnn"),
        (HOPPER, F32, 16, False, "efficient"),
        ((10, 3), BF16, 16, False, "flash"),
        (VOLTA, F16, 16, False, "efficient"),
        (VOLTA, BF16, 16, False, "math"),
    ],
)
def test_the_choice(capability: Capability, dtype: torch.dtype, width: int, masked: bool, kind: str) -> None:
    mask = causal(dtype) if masked else None
    assert attention_on_gpu(*qkv(dtype, width), mask, 0.0, False, capability) == kind


def test_the_choice_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert attention_on_gpu(*qkv(), None, 0.0, False, HOPPER) == "flash"
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        assert attention_on_gpu(*qkv(), None, 0.0, False, HOPPER) == "math"
    assert attention_on_gpu(*qkv(heads=2), None, 0.0, False, AMPERE) == "math"
    assert attention_on_gpu(*qkv(heads=2), None, 0.0, True, AMPERE) == "flash"


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize(
    ("dtype", "heads", "how"),
    [(BF16, 4, "causal"), (BF16, 4, "mask"), (BF16, 4, "bool"), (F32, 4, "mask"), (BF16, 2, "causal"), (BF16, 4, "")],
)
def test_processors_compute_the_same(capability: Capability, dtype: torch.dtype, heads: int, how: str) -> None:
    masks = {"mask": causal(dtype), "bool": causal(dtype) == 0}
    options: dict[str, Any] = {"attn_mask": masks.get(how), "is_causal": how == "causal", "enable_gqa": heads != 4}
    given, other = qkv(dtype, heads=heads), qkv(dtype, heads=heads)
    expected = F.scaled_dot_product_attention(*given, **options)
    called = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    as_on_gpu(capability)(called)
    found = called(*other)
    assert type(found.grad_fn) is not type(expected.grad_fn)
    tolerance = 1e-5 if dtype == F32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for tensors, made in ((given, expected), (other, found)):
        made.float().square().sum().backward()
        assert all(t.grad is not None for t in tensors)
    for a, b in zip(other, given, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=5 * tolerance, atol=5 * tolerance)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner, self.dropout = nn.LayerNorm(64), nn.Linear(64, 192), dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(2, 8, 4, 16).transpose(1, 2) for t in self.inner(self.norm(x)).split(64, -1))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return F.dropout(made.transpose(1, 2).reshape(2, 8, 64), self.dropout).float().mean()


def captured(dropout: float, capability: Capability | None) -> Graph:
    torch.compiler.reset()
    return zgraph.trace(Block(dropout), torch.zeros(2, 8, 64), param_dtype=BF16, capability=capability)


def ops(graph: Graph, word: str) -> list[str]:
    return [n.op.split(".")[1] for n in graph.nodes if word in n.op]


def test_the_graph_is_a_gpus() -> None:
    there = captured(0.1, AMPERE)
    assert ops(there, "dropout") == ["native_dropout", "native_dropout_backward"]
    flash = "_scaled_dot_product_flash_attention"
    assert ops(there, "attention") == [flash, f"{flash}_backward"]
    (attention,) = [n for n in there.nodes if n.op == f"aten.{flash}.default"]
    kinds = [str(r.type) for r in attention.results]
    assert kinds[:2] == ["bf16[2, 4, 8, 16 | 512, 16, 64, 1]", "f32[2, 4, 8]"]
    assert "u64[2]" in kinds, "the seed, which the backward reads"
    assert attention.kwargs == (("scale", 0.25),)
    (norm,) = [n for n in there.nodes if n.op == "aten.native_layer_norm.default"]
    assert [r.tensor.dtype.value for r in norm.results] == ["bf16", "f32", "f32"]
    assert 'device("cpu")' not in zgraph.ir.print_graph(there)
    assert ops(captured(0.0, None), "attention")[0].endswith("for_cpu"), "nothing is left behind"


@pytest.mark.parametrize("capability", [AMPERE, HOPPER, VOLTA])
def test_a_graph_of_a_gpu_can_be_interpreted(capability: Capability) -> None:
    """Its loss and its gradients are those of the model here."""
    torch.manual_seed(0)
    model, x = Block(0.0).to(BF16), torch.randn(2, 8, 64).to(BF16)
    graph = captured(0.0, capability)
    given = {i.value.name: dict(model.named_parameters()).get(i.target or "", x).detach() for i in graph.inputs}
    given |= {i.value.name: torch.ones(()) for i in graph.inputs if i.kind is InputKind.tangent}
    made = [None if ranks is None else ranks[0] for ranks in Interpreter(1).run(graph, given)]
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(made[0], loss.detach(), rtol=1e-2, atol=1e-3)
    names = {i.value.name: i.target for i in graph.inputs}
    parameters = dict(model.named_parameters())
    found = [
        (parameters[names[o.target]].grad, g) for o, g in zip(graph.outputs, made, strict=True) if o.target in names
    ]
    assert len(found) == len(parameters)
    for expected, gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=5e-2, atol=2e-4)


def test_what_a_gpu_draws_is_not_made_up() -> None:
    with pytest.raises(UnknownOpError, match="draws on a GPU"):
        torch.ops.aten._scaled_dot_product_flash_attention(*qkv(), 0.5, False, False)


def test_a_run_for_a_gpu_holds_its_graph() -> None:
    with torch.device("meta"):
        model = small.llama(num_layers=1)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    found = {}
    for name in ("1x2-a100-40", "1x2-h100", "cpu"):
        run = traced(
            model, {"input_ids": ids, "labels": ids}, parse_recipe(RECIPES[3]), hardware=name, param_dtype="bf16"
        )
        found[name] = ops(run.graph(), "attention")[0]
    assert [kind.removeprefix("_scaled_dot_product_") for kind in found.values()] == [
        "efficient_attention",
        "cudnn_attention",
        "flash_attention_for_cpu",
    ]


def test_every_gpu_has_a_capability() -> None:
    found = {name: capability_of(hardware(name)) for name in known() if "/" not in name}
    assert found.pop("cpu") is None
    assert all(found.values())
    assert found["h100"] == found["h200"] == HOPPER
    assert found["v100"] == VOLTA
    assert found["gb300"] == (10, 3)
    assert found["l40s"] == (8, 9)
