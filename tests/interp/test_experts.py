"""Experts divided over simulated ranks: what the whole computes, and what is sent for it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import zgraph
from tests.deep import DEEP, deep
from tests.interp.test_placed import error
from tests.rules.cases import random_case, tolerance
from zgraph.bridge import routes
from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.errors import PlacementError
from zgraph.interpreter import Interpreter
from zgraph.ir import (
    OPS,
    Axis,
    DType,
    Graph,
    Grouped,
    InputKind,
    Mesh,
    Node,
    OutputKind,
    Phase,
    Placement,
    Replicate,
    Shard,
    Value,
    verify,
)
from zgraph.ir.rules import PARTS, RULES, Rule, Strategy, on_parts
from zgraph.ir.rules.grouped import by_groups, row_factor
from zgraph.options.model_plans import planned
from zgraph.passes import RECIPES, Context, along_model_axes, parse_recipe

CPU = torch.device("cpu")
WORDS, ROWS, TOKENS, HIDDEN, TOP = 24, 4, 6, 16, 2
OPTIONS: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "num_experts_per_tok": TOP,
    "use_cache": False,
}


def qwen3() -> nn.Module:
    options = {**OPTIONS, "moe_intermediate_size": 12, "head_dim": 8, "num_experts": 4, "decoder_sparse_step": 1}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**options))


def mixtral() -> nn.Module:
    options = {**OPTIONS, "num_hidden_layers": 2, "intermediate_size": 10, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**options))


MODELS = {"qwen3": qwen3, "mixtral": mixtral}
BATCH = torch.zeros(ROWS, TOKENS, dtype=torch.int64)


@cache
def captured(name: str) -> Graph:
    torch.manual_seed(0)
    return in_dtype(zgraph.trace(MODELS[name](), input_ids=BATCH, labels=BATCH), DType.f64)


def given(graph: Graph, *, lopsided: bool = False) -> dict[str, torch.Tensor]:
    """Random inputs; lopsided, the first experts have all tokens, and others none."""
    torch.manual_seed(1)
    found = {}
    for entry in graph.inputs:
        kind = entry.value.tensor
        size = [int(d) for d in kind.shape]
        drawn = torch.randint(0, WORDS, size) if kind.dtype is DType.i64 else 0.3 * torch.randn(size)
        scale = 0.0 if lopsided and entry.target.endswith("gate.weight") else 1.0
        found[entry.value.name] = (drawn * scale).to(TO_TORCH[kind.dtype])
    return found


def divided(graph: Graph, num_ranks: int, *, all_sharded: bool = True) -> Graph:
    """The graph with its experts cut, and other parameters sharded at rest where they divide."""
    inputs = []
    for entry in graph.inputs:
        shape = entry.value.tensor.shape
        dims = [d for d, size in enumerate(shape) if Shard(d).divides(size, num_ranks)]
        is_cut = entry.kind is InputKind.param and dims and (all_sharded or ".experts." in entry.target)
        inputs.append(replace(entry, cuts=(("expert", Shard(dims[0])),)) if is_cut else entry)
    return replace(graph, inputs=tuple(inputs))


def placed(graph: Graph, num_ranks: int, num_tensor: int = 1) -> Graph:
    """The graph on the ranks of experts, every pass of which computes what the graph before it did."""
    context = Context(mesh=(*[Axis("tensor", num_tensor)] * (num_tensor > 1), Axis("expert", num_ranks)))
    steps = [("captured", graph)]
    for step in parse_recipe("canonicalize,place,place(axis=expert)").passes:
        steps.append((step.name, step.run(steps[-1][1], context)))
    verify(steps[-1][1])
    certify(steps, context)
    return steps[-1][1]


def unowned(node: Node, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Memory that a start has begun with, NaN in the place of rows that no rank sends."""
    found = routes_begun(node, tensors)
    return found if node.op == "put_rows_start" else found.fill_(torch.nan)


routes_begun = routes.begun


@pytest.mark.parametrize(
    ("name", "num_ranks", "lopsided"),
    [("qwen3", 2, False), ("qwen3", 4, True), *(deep("mixtral", n, w) for n in (2, 4) for w in (False, True))],
)
def test_tokens_are_sent_to_their_experts(
    name: str, num_ranks: int, lopsided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "begun", unowned)
    graph = captured(name)
    made, inputs = placed(divided(graph, num_ranks), num_ranks), given(graph, lopsided=lopsided)
    assert error(made, Interpreter().run(made, inputs), graph, Interpreter().run(graph, inputs)) < 1e-12
    num_layers = sum(n.op.startswith("part_grouped") and n.phase is Phase.forward for n in made.nodes) // 2
    found = Counter(f"{n.phase.value} {n.op}" for n in made.nodes if n.op.endswith("rows_start"))
    assert found == {"fwd index_rows_start": 3 * num_layers, "bwd put_rows_start": 3 * num_layers}
    gathered = {n.operands[0].name for n in made.nodes if n.op == "reshard"} & set(made.param_names)
    assert not any(".experts." in entry.target for entry in made.params if entry.value.name in gathered)


@pytest.mark.parametrize(
    ("name", "each_is_cut", "lopsided"),
    [("mixtral", True, False), deep("qwen3", True, True), deep("qwen3", False, False), deep("mixtral", False, True)],
)
def test_experts_go_beside_tensor_parallelism(name: str, each_is_cut: bool, lopsided: bool) -> None:
    graph = divided(captured(name), 2, all_sharded=False)
    cuts = dict(planned(MODELS[name](), 2))
    whole = () if each_is_cut else (".experts.",)
    dense = [i for i in graph.inputs if i.target in cuts and not any(word in i.target for word in whole)]
    inputs = tuple(replace(i, cuts=(("tensor", cuts[i.target]), *i.cuts)) if i in dense else i for i in graph.inputs)
    made = placed(replace(graph, inputs=inputs), 2, 2)
    known, given_to = captured(name), given(graph, lopsided=lopsided)
    assert error(made, Interpreter().run(made, given_to), known, Interpreter().run(known, given_to)) < 1e-12
    routed = [n for n in made.nodes if n.op.endswith("rows_start")]
    assert routed
    assert all(n.option("axis") == "expert" for n in routed)
    kinds = {str(i.value.tensor.placement[:2]) for i in made.params if ".experts." in i.target}
    assert len(kinds) == 1 + each_is_cut  # projections up and down


def test_rows_that_a_model_returns_stay_where_they_were_made() -> None:
    made = placed(divided(captured("qwen3"), 2), 2)
    loss, logits = [o.value for o in made.outputs if o.kind is OutputKind.output and o.value is not None]
    assert (loss.tensor.shape, loss.tensor.placement[0]) == ((), Replicate())
    assert (logits.tensor.shape, logits.tensor.placement[0]) == ((ROWS // 2, TOKENS, WORDS), Shard(0))
    tangents = [i.value.tensor for i in made.inputs if i.kind is InputKind.tangent]
    assert [kind.placement[0] for kind in tangents] == [Replicate(), Shard(0)]
    gathered = [n.operands[0].tensor for n in made.nodes if n.op == "reshard" and n.phase is Phase.forward]
    assert not any(len(kind.shape) == 3 and kind.shape[-1] == WORDS for kind in gathered)


def test_the_bytes_that_are_sent_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, num_ranks = captured("qwen3"), 2
    made, sent, sources = placed(divided(graph, num_ranks), num_ranks), 0, []
    find = routes.route_of

    def counted(node: Node, tensors: list[torch.Tensor], size: int, rank: int) -> routes.Route:
        nonlocal sent
        route = find(node, tensors, size, rank)
        moved = tensors[2 if node.op == "put_rows_start" else 0]
        away = sum(count for peer, count in enumerate(route.num_sent) if peer != rank)
        sent += away * moved[:1].numel() * moved.element_size()
        if not sources:
            sources.append((tensors[1], tensors[2]))
        return route

    monkeypatch.setattr(routes, "route_of", counted)
    Interpreter().run(made, given(graph))
    (tokens, ends), num_local, home = sources[0], 4 // num_ranks, ROWS * TOKENS // num_ranks
    experts = torch.searchsorted(ends, torch.arange(len(tokens)), right=True)
    away = int((experts // num_local != tokens // home).sum())
    assert 0 < away < ROWS * TOKENS * TOP
    assert sent == away * (4 * HIDDEN + 2) * 8  # a token, its result and the gradients of both; its weight, and back
    predicted = sum(OPS[n.op].wire_bytes(n, made.mesh) for n in made.nodes if n.op.endswith("rows_start"))
    balanced = ROWS * TOKENS * TOP * (num_ranks - 1) // num_ranks
    assert predicted * num_ranks == balanced * (4 * HIDDEN + 2) * 8


@pytest.mark.parametrize(("name", "stage"), [("qwen3", 3), *(deep("mixtral", stage) for stage in RECIPES)])
def test_every_stage_composes_with_experts(name: str, stage: int) -> None:
    graph, data = captured(name), (Axis("shard", 2),)
    inputs: dict[str, Any] = dict(given(graph))
    for entry in graph.inputs:
        if entry.kind is InputKind.input:
            inputs[entry.value.name] = [torch.randint(0, WORDS, BATCH.shape) for _ in range(2)]
    found = []
    meshes: list[tuple[str, Mesh]] = [
        (RECIPES[stage], data),
        (along_model_axes(RECIPES[stage], ["expert"]), (Axis("expert", 2), *data)),
    ]
    for recipe, mesh in meshes:
        cut = divided(graph, 2, all_sharded=stage > 0) if len(mesh) > 1 else graph
        last = parse_recipe(recipe).run(cut, Context(mesh=mesh))
        verify(last)
        found.append((last, Interpreter().run(last, inputs)))
    (known, wanted), (made, ours) = found
    assert error(made, ours, known, wanted) < 1e-12


def run_by_groups(op: str, seed: int) -> float | None:
    """How far two ranks that have rows of groups are off the whole, with NaN behind their rows; None without a way."""
    case, rule, r = random_case(seed, op)
    rows = row_factor(rule, rule.ins[0], 0) if rule is not None and rule.ins else ""
    way = by_groups(rule, rows) if rule is not None and rows else None
    if rule is None or way is None or not any(isinstance(p, Grouped) for p in way.ins):
        return None
    count = int(rule.sizes[rows])
    ends = torch.tensor([r.randint(0, count), count])
    worst = 0.0
    for rank, (first, last) in enumerate(((0, int(ends[0])), (int(ends[0]), int(ends[1])))):
        places = zip(case.node.operands, way.ins, strict=True)
        parts = {v.name: _part(case.given[v.name], p, rank, first, last) for v, p in places}
        for got, want, place in zip(_run(case.node, rule, way, parts, rank), case.whole, way.outs, strict=True):
            if got is None or place is None:
                continue
            mine = _part(want, place, rank, first, last)
            if isinstance(place, Grouped):
                got, mine = (t.narrow(place.dim, 0, last - first) for t in (got, mine))
            assert got.shape == mine.shape
            if got.numel():
                off = (got.double() - mine.double()).abs().max() / want.double().abs().max().clamp_min(1.0)
                worst = max(worst, off.item() if off == off or mine.isnan().any() else math.inf)
    return worst / tolerance(case)


def _part(tensor: torch.Tensor, place: Placement | None, rank: int, first: int, last: int) -> torch.Tensor:
    if isinstance(place, Shard):
        return tensor.chunk(2, place.dim)[rank]
    if not isinstance(place, Grouped):
        return tensor
    made = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.ones_like(tensor)
    made.narrow(place.dim, 0, last - first).copy_(tensor.narrow(place.dim, first, last - first))
    return made


def _run(node: Node, rule: Rule, way: Strategy, parts: dict[str, torch.Tensor], rank: int) -> list[torch.Tensor]:
    return computed(*on_parts(node, rule, way, "expert", 2), parts)


def computed(op: str, args: Any, options: Any, parts: dict[str, torch.Tensor]) -> list[Any]:
    """Results of an op of torch on these tensors."""

    def of(value: Value) -> torch.Tensor:
        return parts[value.name]

    given = [to_torch(arg, CPU, of) for arg in args]
    made = resolve(op)(*given, **{key: to_torch(arg, CPU, of) for key, arg in options})
    return list(made) if isinstance(made, tuple | list) else [made]


def test_an_op_on_rows_by_groups_is_the_op_on_all_rows() -> None:
    taken: set[str] = set()
    for op in sorted(RULES.keys() - PARTS.keys()):
        for seed in range(60 if DEEP else 8):
            off = run_by_groups(op, seed)
            if off is not None:
                assert off < 1, (op, seed, off)
                taken.add(op)
    passing = (
        "silu.default",
        "mul.Tensor",
        "split.Tensor",
        "cat.default",
        "t.default",
        "_softmax.default",
    )
    assert {f"aten.{op}" for op in passing} <= taken
    assert not taken & {"aten.sum.default", "aten.mean.default"}


class Mixture(nn.Module):
    """Two experts, and something between them and the tokens."""

    def __init__(self, between: str = "relu") -> None:
        super().__init__()
        self.between, self.num_experts = between, 2
        self.up, self.down = (nn.Parameter(torch.rand(2, *size)) for size in ((8, 16), (16, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x.sum(-1) > 0).long()
        order = torch.sort(ids)[1]
        if self.between == "dense":
            return (x @ self.up[0]) @ self.down[0]
        ends = torch.cumsum(torch.histc(ids.float(), 2, 0, 1), 0, dtype=torch.int32)
        rows = x if self.between == "unordered" else x[order]
        h = torch.ops.transformers.grouped_mm_fallback(rows, self.up, ends)
        h = h - h.mean(0) if self.between == "mixed" else h.relu()
        return torch.ops.transformers.grouped_mm_fallback(h, self.down, ends)[order.argsort()]


def mixture(between: str = "relu", num_rows: int = 8) -> Graph:
    """The graph of such a model, with its experts cut."""
    graph = in_dtype(zgraph.trace(Mixture(between), torch.rand(num_rows, 8)), DType.f64)
    cut = [replace(i, cuts=(("expert", Shard(0)),)) if i.target in ("up", "down") else i for i in graph.inputs]
    return replace(graph, inputs=tuple(cut))


@pytest.mark.parametrize(
    ("between", "num_rows", "words"),
    [
        ("dense", 8, 'config._experts_implementation = "grouped_mm"'),
        ("mixed", 8, "it mixes rows of several experts"),
        ("unordered", 8, "is an input of the model whose rows belong to experts"),
        ("relu", 7, r"shape \(7, 8\) does not divide over 2 ranks of experts"),
    ],
)
def test_what_cannot_be_sent_is_refused(between: str, num_rows: int, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        placed(mixture(between, num_rows), 2)


def test_a_mixture_of_ones_own_is_taken() -> None:
    graph = mixture()
    made = placed(graph, 2)
    torch.manual_seed(0)
    inputs = {i.value.name: torch.randn([int(d) for d in i.value.tensor.shape]).double() for i in graph.inputs}
    assert error(made, Interpreter().run(made, inputs), graph, Interpreter().run(graph, inputs)) < 1e-12
