"""One case of a sharding rule: a random call and strategy, run on ranks that have parts, and whole."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from tests.rules.calls import calls
from zgraph.bridge.aten import FROM_TORCH, resolve
from zgraph.bridge.parts import cut
from zgraph.interpreter import Interpreter, assembled
from zgraph.ir import (
    Axis,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    NoneType,
    Output,
    OutputKind,
    Partial,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Value,
    verify,
)
from zgraph.ir.parts import part_along
from zgraph.ir.rules import Call, Rule, Strategy, on_parts, rule_of

R, P = Replicate(), Partial("sum")


@dataclass
class Case:
    """A call as a graph of one node with whole types, its inputs, and what comes of them."""

    node: Node
    given: dict[str, torch.Tensor]
    whole: list[Any]
    is_multi: bool


def case_of(op: str, arguments: tuple[Any, ...]) -> Case:
    given: dict[str, torch.Tensor] = {}

    def value(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            name = f"x{len(given)}"
            given[name] = arg
            return Value(name, typed(arg))
        if isinstance(arg, torch.dtype):
            return FROM_TORCH[arg]
        return tuple(map(value, arg)) if isinstance(arg, list | tuple) else arg

    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    args = arguments[: len(arguments) - bool(options)]
    made = resolve(op)(*args, **options)
    whole = list(made) if isinstance(made, tuple | list) else [made]
    node = Node(
        op,
        tuple(map(value, args)),
        tuple(Value(f"y{i}", typed(t) if isinstance(t, torch.Tensor) else NoneType()) for i, t in enumerate(whole)),
        tuple((k, value(v)) for k, v in options.items()),
    )
    return Case(node, given, whole, isinstance(made, tuple | list))


def typed(tensor: torch.Tensor) -> TensorType:
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorType(FROM_TORCH[tensor.dtype], tuple(tensor.shape), strides, (R, R))


def strategies(rule: Rule, num_ranks: int, r: random.Random) -> list[Strategy]:
    """The ways that a rule allows, some of them with a cut in blocks."""
    cuts = [(f, (1,)) for f in rule.sizes]
    cuts += [(f, (1,) * q) for f in rule.sizes for q in (2, 3)] + [(f, (2, 1)) for f in rule.sizes]
    r.shuffle(cuts)
    return rule.strategies(num_ranks, cuts)


def run(case: Case, rule: Rule, strategy: Strategy, num_ranks: int) -> float:
    """The largest relative error of what ranks with parts make together. What an operand is not placed for is NaN."""
    node = case.node
    places = [p or R for p in strategy.ins]
    names = [v.name for v in node.operands]
    values = {
        v.name: Value(v.name, part_along(v.tensor, 0, num_ranks, p)) for v, p in zip(node.operands, places, strict=True)
    }
    results = tuple(
        Value(v.name, part_along(v.type, 0, num_ranks, p)) if isinstance(v.type, TensorType) and p is not None else v
        for v, p in zip(node.results, strategy.outs, strict=True)
    )
    op, args, options = on_parts(node, rule, strategy, "tensor", num_ranks)
    placed = Node(op, args, (), options).substitute(values)
    placed = Node(placed.op, placed.args, results, placed.kwargs)
    graph = Graph(
        "one",
        tuple(Input(InputKind.input, values[name]) for name in dict.fromkeys(names)),
        (placed,),
        tuple(Output(OutputKind.output, v) for v in results if isinstance(v.type, TensorType)),
        (Axis("tensor", num_ranks), Axis("shard", 1)),
        {node.op: ExternalOp(multi=case.is_multi)},
    )
    verify(graph)
    placements = dict(zip(names, places, strict=True))
    held = Held(graph, {n: ranks_of(case.given[n], placements[n], num_ranks) for n in placements})
    worst = 0.0
    pairs = [(v, want) for v, want in zip(results, case.whole, strict=True) if isinstance(v.type, TensorType)]
    for (value, want), ranks in zip(pairs, held.outputs, strict=True):
        assert all(tuple(t.shape) == tuple(value.tensor.shape) for t in ranks), (node.op, strategy)
        got = assembled(value.tensor, ranks, graph.mesh)
        assert got.shape == want.shape
        if want.numel():
            error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1.0)
            worst = max(worst, error.item() if error == error or torch.isnan(want).any() else math.inf)
    return worst


class Held:
    """A graph run on what each rank has of the inputs."""

    def __init__(self, graph: Graph, ranks: dict[str, list[torch.Tensor]]) -> None:
        self.outputs = Interpreter().run(graph, {}, resident=ranks)


def tolerance(case: Case) -> float:
    """The relative error that rounding explains: of products of experts there are none in float64."""
    return 1e-5 if any(t.dtype is torch.float32 for t in case.given.values()) else 1e-12


def ranks_of(tensor: torch.Tensor, place: Placement, num_ranks: int) -> list[torch.Tensor]:
    """What each rank has of a tensor; of a sum, random parts."""
    if isinstance(place, Shard):
        return cut(tensor, place, num_ranks)
    if isinstance(place, Partial):
        parts = [torch.randn_like(tensor) for _ in range(num_ranks - 1)]
        return [*parts, tensor - sum(parts)]
    return [tensor.clone() for _ in range(num_ranks)]


def random_case(seed: int, op: str) -> tuple[Case, Rule | None, random.Random]:
    """A random call of an op, and its rule."""
    r = random.Random(f"{seed}{op}")
    torch.manual_seed(seed)
    case = case_of(op, calls(r)[op]())
    return case, rule_of(Call.of(case.node)), r
