"""Attention by functions, compiled where Inductor can."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.deep import deep
from zgraph.bridge.aten import resolve, to_torch
from zgraph.capture.fake import trace
from zgraph.ir import DType, Graph, Node, TensorType
from zgraph.runtime.fused_attention import FusedAttentions
from zgraph.runtime.regions import has_inductor

CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    """Two layers of attention by one function."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score + self.bias[h] * (q - k))
        return x.square().mean()


def runner(graph: Graph, node: Node, found: FusedAttentions) -> object:
    return found.of(node, resolve(node.op), graph.users, graph.output_names)


def made_of(kind: TensorType) -> torch.Tensor:
    """Random numbers, or a block mask that says that there is one block, the first."""
    shape = [int(d) for d in kind.shape]
    return torch.randn(shape) if kind.dtype is DType.f32 else torch.full(shape, int(len(shape) == 3), dtype=torch.int32)


def check(graph: Graph, node: Node) -> None:
    given = {v.name: made_of(v.tensor) for v in node.operands}
    args = [to_torch(a, CPU, lambda v: given[v.name]) for a in node.args]
    run = runner(graph, node, FusedAttentions())
    for made, expected, result in zip(run(*args), resolve(node.op)(*args), node.results, strict=True):
        if result.name in graph.users:
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_layers_share_and_what_inductor_cannot_compile_is_told() -> None:
    graph = trace(Attention(), torch.randn(1, 2, 16, 8), capability=(9, 0))
    forward, backward = (
        [n for n in graph.nodes if n.op.endswith(end)] for end in ("attention.default", "backward.default")
    )
    found = FusedAttentions()
    assert len({id(runner(graph, node, found)) for node in forward}) == 1
    with pytest.warns(UserWarning, match="takes the memory of all scores: Inductor cannot compile it"):
        check(graph, backward[0])


@pytest.mark.skipif(not has_inductor(CPU), reason="no C++ compiler")
@pytest.mark.parametrize("size", [deep(32)])
def test_the_forward_is_what_it_was(size: int, recwarn: pytest.WarningsRecorder) -> None:
    graph = trace(Attention().requires_grad_(False), torch.randn(1, 2, size, 8))
    check(graph, next(n for n in graph.nodes if n.op.endswith("attention.default")))
    assert not [w for w in recwarn if "all scores" in str(w.message)]
