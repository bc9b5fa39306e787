"""Products in float8 on several ranks: the passes of each stage keep the numbers, to the last bit."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import zgraph
from tests.deep import deep
from tests.interp.ranks import Reference, context
from zgraph.debugging.runs import Checked, Options, check_graphs
from zgraph.ir import Axis, Graph
from zgraph.ir.external_ops import FLOAT8_MM
from zgraph.passes import RECIPES, Context, parse_recipe
from zgraph.passes.float8 import Float8


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 48), torch.nn.Linear(48, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


@cache
def reference(recipe: str, num_ranks: int) -> Reference:
    torch.compiler.reset()
    graph = zgraph.trace(Net().bfloat16(), torch.randn(16, 32, dtype=torch.bfloat16))
    chosen = Float8(recipe).run(graph, Context())
    assert sum(n.op == FLOAT8_MM for n in chosen.nodes) == 5
    return Reference(chosen, num_ranks)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_pass_keeps_the_numbers(recipe: str, stage: int, num_ranks: int) -> None:
    reference(recipe, num_ranks).check(parse_recipe(RECIPES[stage]))


@pytest.mark.parametrize(
    ("stage", "num_ranks"), [(1, 2), (2, 3), (3, 2), (3, 3), (3, 5), *(deep(s, n) for s in range(4) for n in (1, 4, 7))]
)
def test_gathers_in_float8_keep_the_numbers(stage: int, num_ranks: int) -> None:
    """Three ranks do not divide the 16 rows of the second weight, and five leave one without any."""
    recipe = RECIPES[stage].replace("broadcast,", "float8-gathers,broadcast,")
    reference("tensorwise", num_ranks).check(parse_recipe(recipe))
    graph = parse_recipe(recipe).run(reference("tensorwise", num_ranks).captured, context(num_ranks))
    moved = [o.tensor.dtype.value for n in graph.nodes if n.op == "all_gather_start" for o in n.operands]
    assert moved.count("f8e4m3") >= (num_ranks > 1 and stage > 0)


def test_gathers_in_float8_on_a_grid_keep_the_numbers() -> None:
    recipe = parse_recipe(RECIPES[3].replace("broadcast,", "float8-gathers,broadcast,"))
    reference("tensorwise", 4).check(recipe, num_copies=2)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_what_is_computed_again_has_the_same_numbers(recipe: str) -> None:
    reference(recipe, 3).check(parse_recipe(RECIPES[3].replace("fit", "recompute(keep_bytes=1)")))


class Square(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(100 * torch.relu(self.first(x)))


def checked(recipe: str, fault: tuple[int, ...] = ()) -> Checked:
    """The numeric check of stage 3 in float8; with the matrices at `fault` of two products exchanged."""
    context = Context(mesh=(Axis("shard", 2),))
    captured = zgraph.trace(Square().bfloat16(), torch.randn(16, 32, dtype=torch.bfloat16))
    steps = [("captured", captured), ("float8", Float8(recipe).run(captured, context))]
    pipeline = parse_recipe(RECIPES[3].replace("broadcast,", "float8-gathers,broadcast,"))
    made = pipeline.steps(steps[-1][1], context)
    steps += [(p.name, ran.after) for p, ran in zip(pipeline.passes, made, strict=True)]
    if fault:
        steps.append(("exchange", exchanged(steps[-1][1], fault)))
    return check_graphs([name for name, _ in steps], steps, context, Options(dtypes=True))


def exchanged(graph: Graph, numbers: tuple[int, ...]) -> Graph:
    """The graph with the operands of these numbers of the second product those of the first."""
    first, second, *_ = (node for node in graph.nodes if node.op == FLOAT8_MM)
    args = tuple(first.args[i] if i in numbers else arg for i, arg in enumerate(second.args))
    return graph.with_nodes([replace(n, args=args) if n is second else n for n in graph.nodes])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_numeric_check_has_nothing_against_it(recipe: str) -> None:
    assert checked(recipe).wrong is None


@pytest.mark.parametrize(("fault", "dtypes"), [((2, 3), False), ((1,), True)], ids=["another matrix", "another scale"])
def test_the_numeric_check_finds_a_wrong_operand(fault: tuple[int, ...], dtypes: bool) -> None:
    """A scale is 1 in fp64, so that a wrong one is found in real dtypes alone."""
    wrong = checked("tensorwise", fault).wrong
    assert wrong is not None
    assert (wrong.step, wrong.dtypes) == ("exchange", dtypes)
