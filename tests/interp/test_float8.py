"""Products in float8 on several ranks: the passes of each stage keep the numbers, to the last bit."""

from functools import cache

import pytest
import torch

import zgraph
from tests.interp.ranks import Reference
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


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_what_is_computed_again_has_the_same_numbers(recipe: str) -> None:
    reference(recipe, 3).check(parse_recipe(RECIPES[3].replace("fit", "recompute(keep_bytes=1)")))
