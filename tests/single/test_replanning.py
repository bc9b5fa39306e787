"""A first run that is out of memory is planned again, once, with a smaller budget."""

import pytest
import torch

import zgraph
from tests.single.scarce import MESSAGE, Scarce, failing
from zgraph.compiler import replanning
from zgraph.compiler.compiled_model import compiled_model
from zgraph.compiler.replanning import missing_bytes


def built(**options: object) -> torch.nn.Module:
    torch.compiler.reset()
    torch.manual_seed(0)
    return zgraph.compile(Scarce(), **options)


def trained(model: torch.nn.Module, num_steps: int = 2) -> list[float]:
    torch.manual_seed(1)
    found = []
    for step in range(num_steps):
        loss = model(torch.ones(24, 32) + step)
        loss.backward()
        found += [loss.item(), *(float(p.grad.norm()) for p in model.parameters())]
        model.zero_grad()
    return found


def peak_bytes(model: torch.nn.Module) -> int:
    report = zgraph.report(model)
    return report.rest_bytes + report.state_bytes + report.entries[0].memory.peak.total_bytes


def test_what_an_error_says_is_missing():
    assert missing_bytes(torch.OutOfMemoryError(MESSAGE)) == 4 << 10
    fragmented = "Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.00 GiB is free."
    assert missing_bytes(torch.OutOfMemoryError(fragmented)) == 3 << 29
    assert missing_bytes(torch.OutOfMemoryError("HIP out of memory")) == 0


@pytest.mark.parametrize("slack", [None, 10_000_000, 0])
def test_a_forward_without_memory_is_planned_again_and_run_again(slack, caplog, monkeypatch):
    """With the numbers of a run that has enough; below the budget, or the predicted peak where that is less."""
    plain = built()
    wanted = trained(plain)
    peak = peak_bytes(plain)
    monkeypatch.setenv("ZGRAPH_LOGS", "capture,recompiles")
    caplog.set_level("INFO", "zgraph")
    model = built(memory_budget=None if slack is None else peak + slack)
    with failing("forward"):
        assert trained(model) == pytest.approx(wanted)
    compiled = compiled_model(model)
    assert compiled.is_replanned
    budget = compiled.context.memory_budget
    assert budget is not None
    assert budget <= peak - (4 << 10)  # a plan within a budget may take less than one without
    (entry,) = zgraph.report(model).entries
    assert entry.memory.peak.total_bytes <= budget - compiled.context.rest_bytes
    assert any("recompute" in n.origin.made_by for n in entry.plan.graph.nodes)
    assert "it is planned again with a budget of" in caplog.text
    assert "captured again" not in caplog.text


def test_the_next_budget_is_what_the_allocator_can_have(monkeypatch):
    """A first op that finds no memory says little of how much the peak lacks."""
    plain = built()
    wanted = trained(plain)
    capacity = peak_bytes(plain) - 4352
    monkeypatch.setattr(replanning, "capacity_bytes", lambda device: capacity)
    model = built()
    with failing("forward"):
        assert trained(model) == pytest.approx(wanted)
    assert compiled_model(model).context.memory_budget == capacity


def test_what_the_allocator_can_have_is_alive_or_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 80 << 30))
    assert replanning.capacity_bytes(torch.device("cuda", 0)) == 65 << 30
    assert replanning.capacity_bytes(torch.device("cpu")) is None


def test_it_is_planned_again_once():
    model = built()
    with failing("forward", "forward"), pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.ones(24, 32))
    assert "pass memory_budget=" in caught.value.__notes__[-1]
    assert torch.isfinite(model(torch.ones(24, 32)))


def test_a_backward_without_memory_is_told_and_the_next_call_is_planned_again():
    wanted = trained(built())
    model = built()
    with failing("backward"):
        torch.manual_seed(1)
        loss = model(torch.ones(24, 32))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            loss.backward()
    assert "the next call of the model is planned with a budget of" in caught.value.__notes__[-1]
    assert "run the step again" in caught.value.__notes__[-1]
    model.zero_grad()
    assert trained(model) == pytest.approx(wanted)
    assert compiled_model(model).is_replanned


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_later_run_without_memory_is_told_what_to_do(phase):
    """It may be the user's own memory that is short."""
    model = built()
    trained(model)
    with failing(phase), pytest.raises(torch.OutOfMemoryError) as caught:
        trained(model)
    assert "memory_budget=" in caught.value.__notes__[-1]
    assert not compiled_model(model).is_replanned


def test_where_no_smaller_plan_is_the_error_is_that_of_memory():
    """With the words of what was tried."""
    smallest = built(memory_budget=60_000)
    with pytest.raises(zgraph.errors.BudgetError) as refused:
        smallest(torch.ones(24, 32))
    model = built(memory_budget=refused.value.needed_bytes)
    with failing("forward"), pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.ones(24, 32))
    assert "is the smallest that can" in caught.value.__notes__[-1]


def test_pieces_are_not_run_twice():
    """Eager code between them would be, too; the next call is planned again."""
    model = built(fullgraph=False)
    with failing("forward"), pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.ones(24, 32))
    assert "the next call of the model is planned" in caught.value.__notes__[-1]
    assert torch.isfinite(model(torch.ones(24, 32)))
    assert compiled_model(model).is_replanned


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_other_errors_are_none_of_memory(phase):
    """Whatever they say."""
    model = built()
    with failing(phase, error=RuntimeError), pytest.raises(RuntimeError, match="Tried to allocate") as caught:
        trained(model)
    assert not getattr(caught.value, "__notes__", [])
    assert not compiled_model(model).is_replanned
