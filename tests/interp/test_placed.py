"""Models whose every node takes a random strategy of its sharding rule compute what they compute whole."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.deep import DEEP
from zgraph.bridge.aten import TO_TORCH
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.errors import ContractError, PlacementError
from zgraph.interpreter import Interpreter, Ranks, assembled
from zgraph.ir import (
    Axis,
    DType,
    Graph,
    InputKind,
    Placement,
    Replicate,
    Shard,
    TensorType,
    model_axes,
    num_data_ranks,
    verify,
)
from zgraph.passes import RECIPES, Context, Pass, along_model_axes, parse_recipe
from zgraph.passes.analysis import placing
from zgraph.passes.place import cut_inputs

VOCABULARY, TOKENS = 24, torch.zeros(2, 12, dtype=torch.int64)


class Fused(nn.Module):
    """A fused projection with biases, a layer norm, heads, and attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, 24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.head = nn.Linear(24, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.embed(input_ids)
        q, k, v = (t.reshape(2, 12, 6, 4).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        h = h + self.out((weights @ v).transpose(1, 2).flatten(2))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


def llama() -> nn.Module:
    return small.llama(24, 1, VOCABULARY, num_heads=6, num_kv_heads=3, inner=48)


MODELS = {"llama": llama, "fused": Fused}
PLANS = {
    "llama": {**dict.fromkeys(("q", "k", "v", "gate", "up"), Shard(0)), **dict.fromkeys(("o", "down"), Shard(1))},
    "fused": {"qkv.weight": Shard(0, (1, 1, 1)), "qkv.bias": Shard(0, (1, 1, 1)), "out.weight": Shard(1)},
}
NUM_PLANS = 25 if DEEP else 4


@cache
def captured(name: str) -> Graph:
    torch.manual_seed(0)
    return in_dtype(zgraph.trace(MODELS[name](), input_ids=TOKENS, labels=TOKENS), DType.f64)


@cache
def inputs(name: str, num_ranks: int = 1) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(1)
    found = {}
    for entry in captured(name).inputs:
        kind = entry.value.type
        if isinstance(kind, TensorType):
            size = [int(d) for d in kind.shape]
            count = num_ranks if entry.kind is InputKind.input else 1
            draws = [
                torch.randint(0, VOCABULARY, size) if kind.dtype is DType.i64 else 0.3 * torch.randn(size)
                for _ in range(count)
            ]
            found[entry.value.name] = [d.to(TO_TORCH[kind.dtype]) for d in draws * (num_ranks // count)]
    return found


def error(graph: Graph, made: list[Ranks | None], known: Graph, wanted: list[Ranks | None]) -> float:
    """The largest relative error of any output; those that are whole along model axes are alike there."""
    worst = 0.0
    for mine, ranks, theirs, right in zip(graph.outputs, made, known.outputs, wanted, strict=True):
        if mine.value is None or ranks is None or right is None or theirs.value is None:
            continue
        kind = mine.value.tensor
        count = num_data_ranks(graph.mesh)
        if all(place == Replicate() for place in kind.placement[: len(model_axes(graph.mesh))]):
            assert all(torch.equal(ranks[rank % count], value) for rank, value in enumerate(ranks))
        got = assembled(kind, ranks, graph.mesh)
        want = assembled(theirs.value.tensor, right, known.mesh or (Axis("shard", 1),))
        worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp_min(1e-300)))
    return worst


def random_cuts(graph: Graph, num_ranks: int, r: random.Random) -> dict[str, Placement]:
    """A placement for each parameter, some of them in blocks."""
    found: dict[str, Placement] = {}
    for entry in graph.params:
        shape = entry.value.tensor.shape
        ways = [Shard(d, b) for d in range(len(shape)) for b in ((1,), (1, 1), (1, 1, 1), (2, 1))]
        place = r.choice([None, *(way for way in ways if way.divides(shape[way.dim], num_ranks))])
        if place is not None:
            found[entry.target] = place
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 4] if DEEP else [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_random_placements(name: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(name)
    wanted = Interpreter().run(graph, inputs(name))
    r = random.Random(num_ranks)
    monkeypatch.setattr(placing.Walk, "cost", lambda *_: (r.random(), 0.0))
    for _ in range(NUM_PLANS):
        cut = cut_inputs(graph, "tensor", random_cuts(graph, num_ranks, r))
        steps = [("captured", cut)]
        context = Context(mesh=(Axis("tensor", num_ranks),))
        placed = parse_recipe("place").run(cut, context)
        verify(placed)
        certify([*steps, ("place", placed)], context)
        made = Interpreter().run(placed, {key: found[0] for key, found in inputs(name).items()})
        assert error(placed, made, graph, wanted) < 1e-12


class Graphs:
    def __init__(self, captured: Graph) -> None:
        self.steps = [("captured", captured)]

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        self.steps.append((step.name, after))


def planned(name: str) -> Graph:
    graph = captured(name)
    cuts = {p.target: place for p in graph.params for key, place in PLANS[name].items() if key in _words(p.target)}
    return cut_inputs(graph, "tensor", cuts)


def _words(target: str) -> set[str]:
    return {target, target.split(".")[-2].removesuffix("_proj")}


DATA = {1: (), 2: (Axis("shard", 2),), 4: (Axis("replicate", 2), Axis("shard", 2))}


@pytest.mark.parametrize(
    ("name", "num_data", "stage"),
    [
        (name, n, s)
        for name in MODELS
        for n in DATA
        for s in RECIPES
        if DEEP or (name, n, s) in (("llama", 2, 3), ("fused", 4, 1), ("fused", 1, 2))
    ],
)
def test_every_stage_composes_with_a_model_axis(name: str, num_data: int, stage: int) -> None:
    graph, data = planned(name), DATA[num_data]
    given = inputs(name, num_data)
    found = []
    for recipe, mesh in (
        (RECIPES[stage], data),
        (along_model_axes(RECIPES[stage]), (Axis("tensor", 3), *data)),
    ):
        context, graphs = Context(mesh=mesh), Graphs(graph)
        last = parse_recipe(recipe).run(graph, context, [graphs])
        verify(last)
        certify(graphs.steps, context)
        found.append((last, Interpreter().run(last, given)))
    (known, wanted), (placed, made) = found
    assert error(placed, made, known, wanted) < 1e-12


def test_a_layer_of_llama_is_summed_twice_in_each_direction() -> None:
    placed = parse_recipe("canonicalize,place").run(planned("llama"), Context(mesh=(Axis("tensor", 3),)))
    moved = [n for n in placed.nodes if n.op == "reshard"]
    assert [n.phase.value for n in moved] == ["fwd", "fwd", "bwd", "bwd"]
    assert {n.results[0].tensor.placement[0] for n in moved} == {Replicate()}


def test_what_does_not_divide_is_refused() -> None:
    graph = cut_inputs(captured("fused"), "tensor", {"qkv.bias": Shard(0, (1, 1, 1))})
    with pytest.raises(PlacementError, match=r"qkv\.bias of shape \(72,\) does not divide into S0/3 on 5 ranks"):
        parse_recipe("place").run(graph, Context(mesh=(Axis("tensor", 5),)))


def test_a_model_axis_without_place_is_refused() -> None:
    with pytest.raises(ContractError, match="put place before partition"):
        parse_recipe("partition(stage=3)").run(captured("fused"), Context(mesh=(Axis("tensor", 2), Axis("shard", 2))))
