"""Vocabularies in parts, sequences in parts, and dropout, on ranks that compute together."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import zgraph
from tests.interp.test_placed import TOKENS, captured, error, inputs, planned
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.interpreter import Interpreter
from zgraph.ir import Axis, DType, Graph, InputKind, Phase, Shard, verify
from zgraph.ir.axis_rules import collective
from zgraph.passes import Context, parse_recipe
from zgraph.passes.place import cut_inputs

CONTEXT = Context(mesh=(Axis("tensor", 3),))


def placed(graph: Graph, recipe: str) -> Graph:
    """The graph after a recipe, every pass of which computes what the graph before it did."""
    steps = [("captured", graph)]
    for step in parse_recipe(recipe).passes:
        steps.append((step.name, step.run(steps[-1][1], CONTEXT)))
    verify(steps[-1][1])
    certify(steps, CONTEXT)
    return steps[-1][1]


def moves(graph: Graph) -> Counter[str]:
    """How often each collective goes over the wire, by phase."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "reshard":
            how = collective(*(v.tensor.placement[0] for v in (node.operands[0], node.results[0])))
            found[f"{node.phase.value} {how}"] += how.endswith("_start")
    return +found


def kept_bytes(graph: Graph) -> int:
    """Bytes of what the forward makes and the backward reads."""
    read = {v.name for node in graph.nodes if node.phase is Phase.backward for v in node.operands}
    made = [r.tensor for n in graph.nodes if n.phase is Phase.forward for r in n.results if r.name in read]
    return sum(int(kind.numel) * kind.dtype.itemsize for kind in made)


def test_the_loss_of_a_vocabulary_in_parts_gathers_nothing() -> None:
    graph = planned("fused")
    cuts = {i.target: dict(i.cuts)["tensor"] for i in graph.params if i.cuts}
    graph = cut_inputs(graph, "tensor", {**cuts, "embed.weight": Shard(0), "head.weight": Shard(0)})
    made = placed(graph, "canonicalize,place")
    # the embedding, the layer's output, and of each row the largest, the sum, and the loss; then a sum of each row's
    # gradients, and the gradients of what the head and the projection read
    assert moves(made) == {"fwd all_reduce_start": 5, "bwd all_reduce_start": 3}
    ops = {node.op for node in made.nodes}
    assert ops > {"part_embedding", "part_embedding_backward", "part_nll_loss", "part_nll_loss_backward"}
    given = inputs("fused")
    assert error(made, Interpreter().run(made, given), graph, Interpreter().run(graph, given)) < 1e-12


def test_an_index_of_no_rank_is_an_error() -> None:
    graph = cut_inputs(captured("fused"), "tensor", {"embed.weight": Shard(0)})
    made = parse_recipe("place").run(graph, CONTEXT)
    ids = next(i.value.name for i in graph.inputs if i.kind is InputKind.input)
    given = {**inputs("fused"), ids: [TOKENS + 99]}
    with pytest.raises(IndexError, match="must be from 0 to 23"):
        Interpreter().run(made, given)


def test_activations_between_blocks_lie_along_the_sequence() -> None:
    graph = planned("llama")
    whole, parts = (placed(graph, f"canonicalize,place{options}") for options in ("", "(sequence=true)"))
    assert moves(whole) == {"fwd all_reduce_start": 2, "bwd all_reduce_start": 2}
    found = moves(parts)
    assert found["fwd reduce_scatter_start"] == 2
    assert found["bwd reduce_scatter_start"] == 2
    assert kept_bytes(parts) < 0.8 * kept_bytes(whole)
    given = inputs("llama")
    wanted = Interpreter().run(graph, given)
    assert error(parts, Interpreter().run(parts, given), graph, wanted) < 1e-12


class Dropping(nn.Module):
    """Dropout of what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.dropout(self.up(x).relu(), 0.4))


def test_dropout_of_parts_drops_what_the_whole_does() -> None:
    graph = in_dtype(zgraph.trace(Dropping(), torch.rand(4, 8)), DType.f64)
    made = placed(cut_inputs(graph, "tensor", {"up.weight": Shard(0), "down.weight": Shard(1)}), "canonicalize,place")
    assert moves(made)["fwd all_gather_start"] == 0
    given = {
        i.value.name: torch.randn([int(n) for n in i.value.tensor.shape], dtype=torch.float64) for i in graph.inputs
    }
    assert error(made, Interpreter().run(made, given), graph, Interpreter().run(graph, given)) < 1e-12
