"""Tokens that are sorted by expert, each rank its own: what the whole computes, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.deep import DEEP, deep
from tests.interp.test_experts import BATCH, MODELS, TOP, captured, computed, given
from tests.interp.test_placed import error
from tests.rules.cases import random_case, tolerance
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.errors import PlacementError, VerifyError
from zgraph.interpreter import Interpreter
from zgraph.ir import Axis, DType, Graph, InputKind, Partial, Phase, Shard, verify
from zgraph.ir.parser import parse_graph
from zgraph.ir.printer import print_graph
from zgraph.ir.rules import PARTS, RULES, Call, localised
from zgraph.ir.rules.grouped import row_factor
from zgraph.ir.rules.own import own_ways
from zgraph.ir.types import Own
from zgraph.options.model_plans import planned
from zgraph.options.parallel import cuts_at_rest, rest_axes
from zgraph.passes import RECIPES, Context, along_model_axes, parse_recipe
from zgraph.passes.analysis.placing import rule_for

CPU = torch.device("cpu")


def divided(graph: Graph, sizes: dict[str, int], *, sharded: bool = True) -> Graph:
    """The graph with its parameters cut as at rest on ranks of these axes."""
    full = {"tensor": 1, "context": 1, "expert": 1, **sizes}
    cuts = planned(MODELS["mixtral"](), full["tensor"]) if full["tensor"] > 1 else {}
    inputs = []
    for entry in graph.inputs:
        if entry.kind is InputKind.param:
            rest = rest_axes(full, sharded=sharded, is_expert=".experts." in entry.target)
            own = (("tensor", cuts[entry.target]),) if entry.target in cuts else ()
            shape = tuple(int(size) for size in entry.value.tensor.shape)
            entry = replace(entry, cuts=cuts_at_rest(shape, own, full, rest))
        inputs.append(entry)
    return replace(graph, inputs=tuple(inputs))


def placed(graph: Graph, sizes: dict[str, int]) -> Graph:
    """The graph on such ranks, every pass of which computes what the graph before it did."""
    context = Context(mesh=tuple(Axis(name, size) for name, size in sizes.items()))
    steps = [("captured", graph)]
    for step in parse_recipe(along_model_axes("canonicalize,", list(sizes)).rstrip(",")).passes:
        steps.append((step.name, step.run(steps[-1][1], context)))
    verify(steps[-1][1])
    certify(steps, context)
    return steps[-1][1]


@pytest.mark.parametrize(
    ("name", "sizes", "lopsided"),
    [
        ("qwen3", {"context": 3}, True),
        deep("mixtral", {"context": 2}, False),
        ("mixtral", {"context": 2, "expert": 2}, True),
        deep("qwen3", {"context": 2, "expert": 4}, False),
        deep("qwen3", {"context": 3, "expert": 2}, True),
        deep("mixtral", {"tensor": 2, "context": 2, "expert": 2}, False),
    ],
)
def test_each_rank_sorts_its_own_tokens(name: str, sizes: dict[str, int], lopsided: bool) -> None:
    graph = captured(name)
    made, inputs = placed(divided(graph, sizes), sizes), given(graph, lopsided=lopsided)
    assert error(made, Interpreter().run(made, inputs), graph, Interpreter().run(graph, inputs)) < 1e-12
    at = list(sizes).index("context")
    products = [n for n in made.nodes if "grouped_mm" in n.op]
    assert products
    assert all(n.operands[0].tensor.placement[at] == Own(0) for n in products)
    rows = BATCH.numel() * TOP // sizes["context"]
    assert {n.operands[0].tensor.shape[0] for n in products} == {rows}
    between = [n for n in made.nodes if n.op == "reshard" and ".mlp.experts" in n.origin.module]
    moved = [n for n in between if len({kind.tensor.placement[at] for kind in (n.operands[0], n.results[0])}) > 1]
    known = {n.name for n in graph.nodes if n.operands and all(v.name in graph.param_names for v in n.operands)}
    weights = {*graph.param_names, *known}
    assert not [n for n in moved if n.phase is Phase.forward and n.operands[0].name.removesuffix("_S0") not in weights]


@pytest.mark.parametrize("stage", [deep(stage) for stage in RECIPES])
def test_every_stage_composes_with_both(stage: int) -> None:
    graph, sizes, data = captured("mixtral"), {"context": 2, "expert": 2}, (Axis("shard", 2),)
    inputs: dict[str, Any] = dict(given(graph))
    for entry in graph.inputs:
        if entry.kind is InputKind.input:
            inputs[entry.value.name] = [torch.randint(0, 24, BATCH.shape) for _ in range(2)]
    known = parse_recipe(RECIPES[stage]).run(graph, Context(mesh=data))
    mesh = (*(Axis(name, size) for name, size in sizes.items()), *data)
    recipe = along_model_axes(RECIPES[stage], list(sizes))
    made = parse_recipe(recipe).run(divided(graph, sizes, sharded=stage > 0), Context(mesh=mesh))
    verify(made)
    assert error(made, Interpreter().run(made, inputs), known, Interpreter().run(known, inputs)) < 1e-12


def test_what_ranks_are_looked_up_for_along_one_axis_is_not_cut_along_another() -> None:
    words, graph = ("model.embed_tokens.weight", "lm_head.weight"), captured("mixtral")
    cut = (replace(i, cuts=(("tensor", Shard(0)),)) if i.target in words else i for i in graph.inputs)
    made = placed(replace(graph, inputs=tuple(cut)), {"tensor": 2})
    found = [(node, rule) for node in made.nodes if node.op in PARTS.values() and (rule := rule_for(node)) is not None]
    assert {"part_embedding", "part_nll_loss_backward"} <= {node.op for node, _ in found}
    assert all(rule.ranked and not rule.allows((rule.ranked[0], (1,)), 2) for _, rule in found)


def test_rows_that_were_sent_wait_on_the_host() -> None:
    graph, sizes = captured("qwen3"), {"expert": 2}
    mesh = (Axis("expert", 2), Axis("shard", 1))
    recipe = along_model_axes(RECIPES[3], ["expert"]).replace("fit", "offload(num_bytes=1000000,min_bytes=1)")
    made = parse_recipe(recipe).run(divided(graph, sizes), Context(mesh=mesh))
    verify(made)
    kinds = [str(n.operands[0].type) for n in made.nodes if n.op == "offload_start"]
    assert any("G0" in kind for kind in kinds)
    inputs = given(graph)
    assert error(made, Interpreter().run(made, inputs), graph, Interpreter().run(graph, inputs)) < 1e-12


@pytest.mark.parametrize("keep_bytes", [1, 1000, 4000, *(deep(num) for num in (200, 600, 2000, 8000))])
def test_an_order_that_is_computed_again_is_the_same(keep_bytes: int) -> None:
    graph, mesh = captured("qwen3"), (Axis("context", 2), Axis("shard", 2))
    recipe = along_model_axes(RECIPES[3], ["context"]).replace("fit", f"recompute(keep_bytes={keep_bytes})")
    made = parse_recipe(recipe).run(divided(graph, {"context": 2}), Context(mesh=mesh))
    verify(made)
    assert any("O0" in str(r.type) for n in made.nodes for r in n.results)


class Mixture(nn.Module):
    """Two experts for a sequence of tokens, and something between."""

    def __init__(self, between: str = "relu") -> None:
        super().__init__()
        self.between, self.num_experts = between, 2
        self.up, self.down = (nn.Parameter(torch.rand(2, *size)) for size in ((8, 16), (16, 8)))

    def forward(self, x: torch.Tensor) -> Any:
        tokens = x.flatten(0, 1)
        ids = (tokens.sum(-1) > 0).long()
        order = torch.sort(ids, stable=self.between == "stable")[1]
        counted = 1 - ids if self.between == "miscounted" else ids
        low, top = {"low": (-1, 1), "high": (1, 2)}.get(self.between, (0, 1))
        ends = torch.cumsum(torch.histc(counted.float(), top - low + 1, low, top), 0, dtype=torch.int32)
        h = torch.ops.transformers.grouped_mm_fallback(tokens[order], self.up, ends)
        changed: dict[str, Callable[[], torch.Tensor]] = {
            "mean": lambda: h - h.mean(0),
            "cumsum": lambda: h.cumsum(0),
            "flip": lambda: h.flip(0),
            "places": lambda: h * torch.arange(len(order), dtype=h.dtype).unsqueeze(1),
            "later": lambda: h * torch.arange(1, len(order) + 1, dtype=h.dtype).unsqueeze(1),
            "ones": lambda: h * torch.ones(len(order), 1, dtype=h.dtype),
            "columns": lambda: h + tokens.new_ones(len(order), len(order))[:, order].sum(1, keepdim=True),
            "load": lambda: h * (ids[order] == 1).sum(),
        }
        h = changed.get(self.between, h.relu)()
        h = torch.ops.transformers.grouped_mm_fallback(h, self.down, ends)
        if self.between == "sorted":
            return h
        back = torch.arange(len(order)) if self.between == "unordered" else order.argsort()
        made = h[back].view_as(x)
        return (made, order) if self.between == "numbers" else made + ends.sum() if self.between == "ends" else made


def mixture(between: str) -> Graph:
    return in_dtype(zgraph.trace(Mixture(between), torch.rand(2, 6, 8)), DType.f64)


@pytest.mark.parametrize(
    ("between", "is_own"),
    [
        *(("relu", True), ("stable", True), ("mean", False), ("cumsum", False), ("miscounted", False)),
        *(("flip", False), ("sorted", False), ("unordered", False), ("numbers", False), ("ends", False)),
        *(("places", False), ("later", False), ("ones", False), ("columns", False), ("load", False), ("high", False)),
    ],
)
def test_what_mixes_rows_is_computed_whole(between: str, is_own: bool) -> None:
    graph = mixture(between)
    made = placed(graph, {"context": 2})
    torch.manual_seed(0)
    inputs = {i.value.name: torch.randn([int(d) for d in i.value.tensor.shape]).double() for i in graph.inputs}
    assert error(made, Interpreter().run(made, inputs), graph, Interpreter().run(graph, inputs)) < 1e-12
    assert any("O0" in str(r.type) for n in made.nodes for r in n.results) is is_own


def test_experts_whose_tokens_are_computed_whole_are_not_divided() -> None:
    graph = mixture("mean")
    cut = [replace(i, cuts=(("expert", Shard(0)),)) if i.target in ("up", "down") else i for i in graph.inputs]
    with pytest.raises(PlacementError, match="leave expert_parallel= out"):
        placed(replace(graph, inputs=tuple(cut)), {"context": 2, "expert": 2})


@pytest.fixture(scope="module")
def text() -> str:
    graph = captured("mixtral")
    return print_graph(placed(divided(graph, {"context": 2}, sharded=False), {"context": 2}), origins=False)


def by_counts_of_another_layer(lines: list[str]) -> None:
    counts = re.findall(r"%(\w+): i32\[4\]<P\(sum\), R> = aten\.cumsum", "\n".join(lines))
    assert len(counts) == 2
    lines[:] = [line.replace(f"%{counts[1]})", f"%{counts[0]})") for line in lines]


def counted_in_other_bins(lines: list[str]) -> None:
    at = next(number for number, line in enumerate(lines) if line.startswith("fwd") and "aten.histc" in line)
    lines[at] = lines[at].replace(", 0, 3)", ", 0, 0)")


def put_back_by_another_layer(lines: list[str]) -> None:
    at = [number for number, line in enumerate(lines) if "aten.index_put.default(%empty" in line]
    first, second = (re.findall(r"%(\w+):", lines[number])[0] for number in at)
    later = range(at[1] + 1, len(lines))
    lines[at[1] + 1 :] = [lines[number].replace(f"[%{second}]", f"[%{first}]") for number in later]


def returned(lines: list[str]) -> None:
    rows = next(re.findall(r"%(\w+):", line)[0] for line in lines if "= transformers.grouped_mm_fallback" in line)
    at = next(number for number, line in enumerate(lines) if line.startswith("return fwd output %"))
    lines[at] = re.sub(r"%\w+", f"%{rows}", lines[at])


def counted_up(lines: list[str]) -> None:
    at = next(number for number, line in enumerate(lines) if line.startswith("fwd") and "aten.silu.default" in line)
    lines[at] = re.sub(r"aten\.silu\.default\((%\w+)\)", r"aten.cumsum.default(\1, 0)", lines[at])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (by_counts_of_another_layer, "two orders"),
        (counted_in_other_bins, "aten.histc.default cannot make"),
        (put_back_by_another_layer, "two orders"),
        (returned, r"returns %\w+, which is in an order of the rank's own"),
        (counted_up, "aten.cumsum.default"),
    ],
)
def test_orders_are_not_mixed(text: str, change: Callable[[list[str]], None], words: str) -> None:
    lines = text.splitlines()
    change(lines)
    assert lines != text.splitlines()
    with pytest.raises(VerifyError, match=words):
        verify(parse_graph("\n".join(lines)))


def rows_alone(op: str, seed: int) -> float | None:
    """How far ranks are off the whole that have rows of an op in any order; None where it does not pass rows."""
    case, rule, r = random_case(seed, op)
    call = Call.of(case.node)
    rows = row_factor(rule, rule.ins[0], 0) if rule is not None and rule.ins else ""
    if rule is None or not rows or not isinstance(rule.sizes[rows], int) or rule.sizes[rows] % 2:
        return None
    places = [Own(0), *[None] * (len(call.ins) + len(call.outs) - 1)]
    ways = [way for way in own_ways(call, rule, places, 2) if way.ins[0] == Own(0)]
    if not ways or any(word in op for word in ("sort", "cumsum", "index", "grouped_mm")):
        return None  # not row by row: the models above have these
    (way,) = ways
    order = torch.tensor(r.sample(range(rule.sizes[rows]), rule.sizes[rows])).chunk(2)
    made = []
    for mine in order:
        parts = {
            v.name: case.given[v.name].index_select(p.dim, mine) if isinstance(p, Own) else case.given[v.name]
            for v, p in zip(case.node.operands, way.ins, strict=True)
        }
        args = localised(case.node, rule, (*way.ins, *way.outs), 2)
        made.append(computed(op, args, case.node.kwargs, parts))
    worst = 0.0
    for number, (want, place) in enumerate(zip(case.whole, way.outs, strict=True)):
        if place is None or not isinstance(want, torch.Tensor):
            continue
        got = [one[number] for one in made]
        if isinstance(place, Own):
            pairs = [(one, want.index_select(place.dim, mine)) for one, mine in zip(got, order, strict=True)]
        else:
            assert place == Partial("sum")
            pairs = [(got[0] + got[1], want)]
        for one, other in pairs:
            assert one.shape == other.shape
            if one.numel():
                off = (one.double() - other.double()).abs().max() / want.double().abs().max().clamp_min(1.0)
                worst = max(worst, off.item())
    return worst / tolerance(case)


def test_an_op_that_passes_rows_makes_of_own_rows_what_the_whole_has_of_them() -> None:
    taken: set[str] = set()
    for op in sorted(RULES.keys() - PARTS.keys()):
        for seed in range(60 if DEEP else 6):
            off = rows_alone(op, seed)
            if off is not None:
                assert off < 1, (op, seed, off)
                taken.add(op)
    assert {f"aten.{op}" for op in ("silu.default", "mul.Tensor", "cat.default", "sum.dim_IntList")} <= taken
