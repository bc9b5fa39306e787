"""Sequences in parts over the ranks of a context: what the whole computes, and what is exchanged for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.deep import deep
from tests.interp.test_placed import TOKENS, VOCABULARY, captured, error, inputs, planned
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.errors import PlacementError
from zgraph.interpreter import Interpreter
from zgraph.ir import Axis, DType, Graph, InputKind, Mesh, Node, Shard, verify
from zgraph.ir.axis_rules import collective
from zgraph.ir.parts import part_shape
from zgraph.passes import Context, parse_recipe


class Loss(nn.Module):
    """A model that returns its loss alone, and none of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


def placed(graph: Graph, mesh: Mesh) -> Graph:
    """The graph on the mesh, every pass of which computes what the graph before it did."""
    context = Context(mesh=mesh)
    steps = [("captured", graph)]
    along = "".join(f",place(axis={axis.name})" for axis in mesh)
    for step in parse_recipe(f"canonicalize{along}").passes:
        steps.append((step.name, step.run(steps[-1][1], context)))
    verify(steps[-1][1])
    certify(steps, context)
    return steps[-1][1]


def at_rest(graph: Graph, num_ranks: int) -> Graph:
    """The graph with parameters sharded over the ranks of a context too, behind other cuts."""
    found = []
    for entry in graph.inputs:
        shape = entry.value.tensor.shape
        for _, place in entry.cuts:
            shape = part_shape(shape, place, 3)
        divides = entry.kind is InputKind.param and shape and Shard(0).divides(shape[0], num_ranks)
        found.append(replace(entry, cuts=(*entry.cuts, ("context", Shard(0)))) if divides else entry)
    return replace(graph, inputs=tuple(found))


def moves(graph: Graph, axis: int) -> Counter[str]:
    """How often each collective goes over the wire along an axis, by phase."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "reshard":
            old, new = (v.tensor.placement[axis] for v in (node.operands[0], node.results[0]))
            how = collective(old, new)
            found[f"{node.phase.value} {how.removesuffix('_start')}"] += how.endswith("_start")
    return +found


def exact(graph: Graph, made: Graph, name: str) -> bool:
    given = inputs(name)
    return error(made, Interpreter().run(made, given), graph, Interpreter().run(graph, given)) < 1e-12


@pytest.mark.parametrize(("name", "num_ranks"), [("llama", 3), ("fused", 2), deep("llama", 2), deep("fused", 3)])
def test_attention_exchanges_the_sequence_for_heads(name: str, num_ranks: int) -> None:
    graph = captured(name)
    made = placed(graph, (Axis("context", num_ranks),))
    assert exact(graph, made, name)
    found = moves(made, 0)
    assert found["fwd all_to_all"] == 4  # queries, keys and values, and what attention makes of them
    assert found["fwd all_reduce"] == 2  # the sum of losses, and how many labels count
    assert found["fwd all_gather"] == (name == "llama")  # the logits, which it returns


@pytest.mark.parametrize("name", ["fused", deep("llama")])
def test_parameters_are_sharded_over_the_ranks_of_a_context(name: str) -> None:
    graph = at_rest(captured(name), 2)
    made = placed(graph, (Axis("context", 2),))
    assert exact(graph, made, name)
    cut = [entry.value.tensor.placement[0] for entry in made.params]
    assert cut.count(Shard(0)) == len(cut)
    found = moves(made, 0)
    assert found["bwd reduce_scatter"] >= len(cut)
    assert "bwd all_reduce" not in found


@pytest.mark.parametrize("name", ["llama", deep("fused")])
def test_it_goes_with_tensor_parallelism(name: str) -> None:
    graph = planned(name)
    words = {"llama": ("model.embed_tokens.weight", "lm_head.weight"), "fused": ("embed.weight", "head.weight")}[name]
    tables = tuple(replace(i, cuts=(("tensor", Shard(0)),)) if i.target in words else i for i in graph.inputs)
    graph = at_rest(replace(graph, inputs=tables), 2)
    made = placed(graph, (Axis("tensor", 3), Axis("context", 2)))
    assert exact(graph, made, name)
    assert moves(made, 1)["fwd all_to_all"] == 4
    gathered = moves(made, 1)["fwd all_gather"] - sum(bool(i.cuts) for i in graph.params)
    assert gathered == (name == "llama")  # its logits alone, of what is no parameter


def loss_of(model: nn.Module, tokens: torch.Tensor) -> Graph:
    torch.manual_seed(0)
    return in_dtype(zgraph.trace(Loss(model), input_ids=tokens, labels=tokens), DType.f64)


def test_what_a_rank_sends_shrinks_with_the_ranks() -> None:
    graph = loss_of(small.llama(32, 1, VOCABULARY, num_heads=4, num_kv_heads=4, inner=48), TOKENS)
    sent = {}
    for count in (2, 4):
        made = placed(graph, (Axis("context", count),))
        assert "fwd all_gather" not in moves(made, 0)
        exchanged = [n.operands[0].tensor for n in made.nodes if n.op == "reshard" and "all_to_all" in _how(n)]
        sent[count] = sum(int(kind.numel) * (count - 1) // count for kind in exchanged)
    hidden = 2 * 12 * 32
    assert sent == {count: 8 * hidden * (count - 1) // count**2 for count in (2, 4)}  # Ulysses, section 3.2


def _how(node: Node) -> str:
    return collective(*(v.tensor.placement[0] for v in (node.operands[0], node.results[0])))


class Heads(nn.Module):
    """Causal attention of three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(2, 12, 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum()


def test_what_does_not_divide_is_refused() -> None:
    graph = captured("llama")
    with pytest.raises(PlacementError, match=r"\(2, 12\) does not divide over 5 ranks of context; pad it"):
        placed(graph, (Axis("context", 5),))
    heads = zgraph.trace(Heads(), torch.rand(2, 12, 12))
    with pytest.raises(PlacementError, match=r"3 heads of queries and 3 of keys, which do not divide over 2 ranks"):
        placed(heads, (Axis("context", 2),))
    assert any(n.op == "reshard" and "all_to_all" in _how(n) for n in placed(heads, (Axis("context", 3),)).nodes)
    graph = in_dtype(zgraph.trace(nn.Linear(4, 4), torch.rand(4)), DType.f64)
    with pytest.raises(PlacementError, match="no input has a sequence"):
        placed(graph, (Axis("context", 2),))


def test_what_is_searched_is_refused() -> None:
    for options in ("sequence=true", "search=all"):
        with pytest.raises(Exception, match="along context, what is cut is the sequence"):
            parse_recipe(f"place(axis=context,{options})")
