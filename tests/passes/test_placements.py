"""The search of placements: nothing beats it, and it says exactly what is sent and how long that takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.deep import DEEP
from zgraph.certify.certificate import certify
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import PlacementError
from zgraph.interpreter import Interpreter
from zgraph.ir import OPS, Axis, Graph, Placement, Replicate, Shard, parse_graph, verify
from zgraph.passes import Context, parse_recipe
from zgraph.passes.exchange import Exchange
from zgraph.passes.place import Place, cut_inputs
from zgraph.passes.placements import Search
from zgraph.passes.placements.prices import Prices
from zgraph.passes.placements.search import Found
from zgraph.passes.placements.twins import twins

R = Replicate()
TOKENS = torch.zeros(2, 12, dtype=torch.int64)


def costs(bytes_per_s: float = 3e8, latency_us: float = 1.0) -> CostTable:
    """Devices so slow that it pays to cut small models."""
    known = hardware("cpu")
    rates = {"launch_us": 0.0, "matmul_half_flop": 0.0, "memory_bytes_per_s": 1e10, "matmul_flops": {"f32": 1e9}}
    device = known.device.model_copy(update=rates)
    link = Link(bytes_per_s=bytes_per_s, latency_us=latency_us)
    return CostTable(
        hardware=known.model_copy(update={"device": device, "devices_per_host": 8, "within": link}), per_host=8
    )


def context(num_ranks: int, table: CostTable | None = None, num_data: int = 1) -> Context:
    data = (Axis("shard", num_data),) if num_data > 1 else ()
    return Context(mesh=(Axis("tensor", num_ranks), *data), costs=table or costs())


class Block(nn.Module):
    """Layers with a skip around each pair."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = x
        for number, layer in enumerate(self.layers):
            x = layer(nn.functional.silu(x))
            if x.shape == skipped.shape and number % 2:
                x = skipped = x + skipped
        return x.square().sum()


class Layer(nn.Module):
    """A layer of a transformer: attention of four heads over queries, keys and values, and two matrices behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(1, -1, 4, 4).transpose(1, 2) for layer in self.layers[:3])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.layers[3](mixed.transpose(1, 2).flatten(2))
        return (x + self.down(nn.functional.silu(self.up(x)))).square().sum()


def captured(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Graph:
    return parse_recipe("canonicalize").run(zgraph.trace(model, *args, **kwargs), Context())


def llama() -> Graph:
    model = small.llama(48, 1, 24, num_heads=6, num_kv_heads=3, inner=96)
    return captured(model, input_ids=TOKENS, labels=TOKENS)


def counted(placed: Graph, given: Context) -> tuple[float, int]:
    """Time and bytes of a placed graph's nodes, one by one."""
    graph = Exchange().run(placed, given)
    us, sent = 0.0, 0
    for node in graph.nodes:
        if node.op in OPS and OPS[node.op].lane == "comm":
            us += given.costs.transfer_us(graph, node, {})
            sent += OPS[node.op].wire_bytes(node, graph.mesh)
        elif node.op != "wait":
            us += given.costs.node_us(graph, node, {})
    return us, sent


def whole_us(graph: Graph, given: Context, places: Mapping[str, Placement], placed: Graph) -> tuple[float, int]:
    """Time and bytes of a step with these parameters."""
    prices = Prices(graph, given.mesh[0], given)
    us, sent = counted(placed, given)
    return us + sum(prices.at_rest_us(i, places.get(i.value.name, R)) for i in graph.params), sent


def ways(graph: Graph, num_ranks: int) -> list[dict[str, Placement]]:
    """Every placement of all parameters."""
    options = [
        [
            (i.value.name, p)
            for p in (R, Shard(0), Shard(1))
            if p == R or p.divides(i.value.tensor.shape[p.dim], num_ranks)
        ]
        for i in graph.params
    ]
    return [dict(choice) for choice in itertools.product(*options)]


def greedy(graph: Graph, given: Context, places: Mapping[str, Placement]) -> Graph:
    """What `place` makes without a search."""
    cuts = {i.target: place for i in graph.params if (place := places[i.value.name]) != R}
    return Place().run(cut_inputs(graph, "tensor", cuts), given)


BLOCKS = {"two": (8, 32, 8), "three": (12, 24, 24, 12)}
if DEEP:
    BLOCKS |= {"four": (8, 16, 8, 24, 8), "six": (8, 16, 8, 16, 8, 16, 8), "eight": (8, 16, 8, 16, 8, 16, 8, 16, 8)}
    BLOCKS |= {"layer": ()}


def block(name: str) -> Graph:
    sizes = BLOCKS[name]
    return captured(Block(sizes), torch.rand(16, sizes[0])) if sizes else captured(Layer(), torch.rand(1, 16, 16))


@pytest.mark.parametrize("bytes_per_s", [1e7, 3e8])
@pytest.mark.parametrize("name", BLOCKS)
def test_no_placement_of_parameters_beats_it(name: str, bytes_per_s: float) -> None:
    graph = block(name)
    given = context(2, costs(bytes_per_s))
    found = Search(graph, given.mesh[0], given, {}).found
    assert found.gap < 2e-4
    tried = ways(graph, 2)
    for places in tried:
        us, _ = whole_us(graph, given, places, greedy(graph, given, places))
        assert us >= found.total_us * (1 - 2e-4), places
    for places in random.Random(0).sample(tried, min(len(tried), 20 if DEEP else 4)):
        assert Search(graph, given.mesh[0], given, places).found.total_us >= found.total_us * (1 - 2e-4)


@pytest.mark.parametrize(("num_ranks", "num_data"), [(2, 1), (3, 2)])
def test_what_is_predicted_is_what_is_counted(num_ranks: int, num_data: int) -> None:
    graph, given = llama(), context(num_ranks, num_data=num_data)
    search = Search(graph, given.mesh[0], given, {})
    found = search.found
    placed = Place(search="all").run(graph, given)
    verify(placed)
    certify([("captured", graph), ("place", placed)], given)
    alone = context(num_ranks)
    us, sent = counted(placed, alone)
    rest = sum(search.prices.at_rest_us(i, found.places[i.value.name]) for i in graph.params)
    assert us + rest == pytest.approx(found.total_us, rel=1e-9)
    assert sent == found.sent_bytes > 0
    assert found.bound_us <= found.total_us * (1 + 1e-9)


def test_random_placements_are_predicted_too() -> None:
    """Parameters as stated, values as searched: exact, and never slower than one node at a time."""
    graph, given, r = llama(), context(3), random.Random(1)
    for _ in range(20 if DEEP else 2):
        places: dict[str, Placement] = {}
        for entry in graph.params:
            shape = entry.value.tensor.shape
            options = [R, *(Shard(d) for d in range(len(shape)) if Shard(d).divides(shape[d], 3))]
            places[entry.value.name] = r.choice(options)
        found = Search(graph, given.mesh[0], given, places, free=False).found
        cuts = {i.target: place for i in graph.params if (place := places[i.value.name]) != R}
        placed = Place(search="values").run(cut_inputs(graph, "tensor", cuts), given)
        verify(placed)
        us, sent = whole_us(graph, given, places, placed)
        assert (us, sent) == (pytest.approx(found.total_us, rel=1e-9), found.sent_bytes)
        assert us <= whole_us(graph, given, places, greedy(graph, given, places))[0] * (1 + 2e-4)


def test_a_searched_model_computes_what_it_computes_whole() -> None:
    graph, given = llama(), context(3)
    torch.manual_seed(0)
    inputs = {
        i.value.name: torch.randint(0, 24, i.value.tensor.shape)
        if i.value.tensor.dtype.value == "i64"
        else 0.3 * torch.randn(i.value.tensor.shape)
        for i in graph.inputs
    }
    wanted = Interpreter().run(graph, {name: [value] for name, value in inputs.items()})
    placed = Place(search="all").run(graph, given)
    made = Interpreter().run(placed, {name: [value] * 3 for name, value in inputs.items()})
    assert wanted[0] is not None
    assert made[0] is not None
    for value in made[0]:
        assert torch.allclose(value, wanted[0][0], rtol=1e-5)


def test_sequences_are_cut_where_memory_is_slow() -> None:
    """Sequence parallelism: sums are scattered over the tokens, and gathered in front of the next product."""
    graph, given = llama(), context(3)
    placed = Place(search="all").run(graph, given)
    kinds = {
        (str(n.operands[0].tensor.placement[0]), str(n.results[0].tensor.placement[0]))
        for n in placed.nodes
        if n.op == "reshard"
    }
    assert ("P(sum)", "S1") in kinds
    assert ("S1", "R") in kinds


def test_the_next_best_takes_longer() -> None:
    graph, given = captured(Block((8, 32, 8)), torch.rand(64, 8)), context(2)
    search = Search(graph, given.mesh[0], given, {})
    for entry in graph.params:
        others = search.alternatives(entry.value.name)
        assert {a.place for a in others} | {search.found.places[entry.value.name]} == {R, Shard(0), Shard(1)}
        assert [a.more_us for a in others] == sorted(a.more_us for a in others)
        fixed = {entry.value.name: others[0].place}
        again = Search(graph, given.mesh[0], given, fixed).found.total_us - search.found.total_us
        assert others[0].more_us == pytest.approx(again, rel=1e-3, abs=1e-3 * search.found.total_us)


def test_no_axis_but_that_of_tensor_parallelism_is_searched() -> None:
    for axis, cut in (("context", "the sequence"), ("expert", "the batch")):
        with pytest.raises(ValueError, match=f"along {axis}, what is cut is {cut}"):
            Place(axis=axis, search="all")


@pytest.mark.parametrize("num_layers", [8, 9])
def test_of_few_matrices_each_is_searched(num_layers):
    """Layers stand for each other by fours, from nine matrices on."""
    layers = range(num_layers)
    text = [
        'graph "layers"',
        "op aten.mm.default",
        *(f'param %w{i}: f32[4, 4] "layers.{i}"' for i in layers),
        "input %y0: f32[4, 4]",
        *(f"fwd %y{i + 1}: f32[4, 4] = aten.mm.default(%y{i}, %w{i})" for i in layers),
        f"return fwd output %y{num_layers}",
    ]
    stands = twins(parse_graph("\n".join(text)))
    assert stands == ((*range(8),) if num_layers == 8 else tuple(i % 4 for i in layers))


@pytest.mark.parametrize(
    ("total_us", "bound_us", "gap"), [(110.0, 100.0, 0.1), (100.0, 100.0, 0.0), (99.999, 100.0, 0.0), (5.0, 0.0, 0.0)]
)
def test_a_gap_is_a_share_of_the_bound(total_us, bound_us, gap):
    assert Found({}, {}, total_us, bound_us, 0).gap == pytest.approx(gap)


def test_sizes_that_are_symbols_are_refused() -> None:
    graph = zgraph.trace(nn.Linear(4, 8), torch.rand(6, 4), dynamic=True)
    with pytest.raises(
        PlacementError, match=r"needs sizes that are numbers, and %\w+ is f32\[s\d+, 4\].*dynamic=False"
    ):
        Place(search="all").run(graph, Context(mesh=(Axis("tensor", 2),)))
