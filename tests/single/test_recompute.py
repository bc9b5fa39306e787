"""A memory budget on one rank: what does not fit is computed again or moved, the losses stay, the peak is predicted."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zgraph
from tests.deep import DEEP, deep
from tests.single.trained import MODELS, Trained, batch, llama, plain
from zgraph.errors import BudgetError

NUM_BUDGETS = 10 if DEEP else 4


def smallest(name: str, **options: object) -> int:
    """The smallest budget, as the refusal says."""
    with pytest.raises(BudgetError, match="is the smallest that can") as refused:
        Trained(name, 1_000_000, **options)
    return int(str(refused.value).split(" is the smallest that can")[0].split()[-1].replace(",", ""))


@pytest.mark.parametrize("name", [deep(n) if n == "t5" else n for n in MODELS])
def test_a_budget_holds_and_the_losses_stay(name):
    """Every second time what waits for the backward may do so on the host."""
    roomy = plain(name)
    least = smallest(name)
    assert least < roomy.predicted
    for number in range(NUM_BUDGETS):
        budget = roomy.predicted - (roomy.predicted - least) * number // (NUM_BUDGETS - 1)
        trained = Trained(name, budget, offload="activations" if number % 2 else None)
        assert trained.losses == roomy.losses
        assert trained.peak <= budget + 64, "the loss is the caller's"
        assert trained.predicted == pytest.approx(trained.peak, rel=0.03)
        assert (trained.num_again + trained.num_moved > 0) == (number > 0)
        assert number % 2 or trained.num_moved == 0


def test_half_of_the_activations_cost_little():
    """A tenth of the step's FLOP at most."""
    flop, kept = [], 0
    for keep_bytes in (1 << 40, 0):
        torch.compiler.reset()
        recipe = zgraph.recipe(3).replace("fit", f"recompute(keep_bytes={keep_bytes or kept // 2})")
        model = zgraph.compile(llama(), passes=recipe)
        model(**batch("llama", 0)).loss.backward()
        (entry,) = zgraph.report(model).entries
        kept = max(m.bytes_by_category.get("activations", 0) for m in entry.memory.moments)
        flop.append(entry.flop)
    assert flop[0] < flop[1] <= 1.1 * flop[0]


class Marked(nn.Module):
    """Two layers, of which the user wants the first computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.sin(self.first(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(self.body, x, use_reentrant=False)).mean()


def test_regions_that_the_user_marked_are_computed_again():
    torch.manual_seed(0)
    model = zgraph.compile(Marked())
    x = torch.randn(8, 16)
    model(x).backward()
    (entry,) = zgraph.report(model).entries
    again = [n.op for n in entry.plan.graph.nodes if n.origin.made_by == "recompute"]
    assert any(op.startswith("aten.addmm") for op in again)
    plain = Marked()
    plain.load_state_dict(model.state_dict())
    plain(x).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
