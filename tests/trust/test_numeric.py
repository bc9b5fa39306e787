"""The numeric check finds faults in each program that training makes of a graph, and refuses no valid graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.interp import models
from tests.interp.ranks import context
from tests.trust import faults
from zgraph.debugging import Failure, Programs, examine, reference
from zgraph.debugging.known import Known
from zgraph.debugging.runs import Options, check_graphs
from zgraph.debugging.training import Training
from zgraph.ir import Axis, DType, Graph, InputKind
from zgraph.passes import RECIPES, Context, fusing, parse_recipe
from zgraph.runfile.format import Recording

LOWER = "broadcast,all-gather,reduce-scatter,all-reduce,host-copies,release"
PLAIN = {stage: f"canonicalize,partition(stage={stage}),{LOWER},dce" for stage in range(4)}
"""The stages without buckets and schedule, so that a fault finds its place by the names of ops."""


class Positions(nn.Module):
    """Positions are shifted before they choose a row, as in OPT, and where a token is padding another row is read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(9, 4)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.rows((positions * 1 + 2).clamp(max=100))).sum()


class Net(nn.Module):
    """A loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        return nn.functional.cross_entropy(logits, y), logits


def _llama(**options: object) -> Graph:
    model = small.llama(8, 1, 11, num_heads=2, num_kv_heads=1, inner=12)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return zgraph.trace(model, input_ids=ids, labels=ids, **options)


@cache
def captured(name: str) -> Graph:
    made: dict[str, Callable[[], Graph]] = {
        "llama": _llama,
        "bf16 llama": lambda: _llama(param_dtype=torch.bfloat16),
        "net": lambda: zgraph.trace(Net(), torch.rand(5, 4), torch.zeros(5, dtype=torch.int64)),
        "bf16 net": lambda: zgraph.trace(
            Net(), torch.rand(5, 4), torch.zeros(5, dtype=torch.int64), param_dtype=torch.bfloat16
        ),
        "positions": lambda: zgraph.trace(Positions(), torch.zeros(2, 5, dtype=torch.int64)),
    }
    return made[name]() if name in made else models.captured(name)


@cache
def known(name: str, num_ranks: int = 2, dtype: DType | None = DType.f64, reduce_dtype: DType | None = None) -> Known:
    return reference(captured(name), num_ranks, dtype=dtype, reduce_dtype=reduce_dtype)


@cache
def final(name: str, recipe: str, num_ranks: int = 2) -> Graph:
    return parse_recipe(recipe).run(captured(name), context(num_ranks))


def failing(graph: Graph, name: str, dtype: DType | None = DType.f64, programs: Programs | None = None) -> Failure:
    found = examine(known(name, dtype=dtype), graph, programs=programs)
    assert found is not None
    return found


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "stages", "name", "program"),
    [
        (faults.scaled_gradient, (0, 1, 2, 3), "net", "synced"),
        (faults.held_for_another, (1,), "llama", "no_sync"),
        (faults.swapped_names, (0, 1), "net", "no_sync"),
        (faults.not_accumulated, (0, 1), "net", "no_sync"),
        (faults.accumulated_too, (2, 3), "net", "no_sync"),
        (faults.forgotten, (0, 1), "net", "no_sync"),
        (faults.zero_matters, (0, 3), "llama", "without tangents"),
        (faults.written_gather, (1, 2), "net", "no_sync"),
        (faults.written_parameter, (0,), "net", "second step"),
        (faults.released_parameter, (0, 3), "net", "second step"),
        (faults.corrupted_rows, (3,), "llama", "synced"),
        (faults.corrupted_rows, (0, 3), "positions", "synced"),
        (faults.own_buffers, (0, 3), "convnet", "synced"),
        (faults.other_dropout, (0, 3), "tied", "synced"),
    ],
)
def test_a_fault_is_found_in_its_program(fault, stages, name, program):
    for stage in stages:
        failure = failing(fault(final(name, PLAIN[stage])), name)
        assert failure.program == program, failure
        assert failure.kind == "differs", failure


def test_a_fault_in_one_derived_program_is_found_there():
    """Where what derives the program is wrong, and the graph is right."""
    graph = final("net", PLAIN[0])
    right = Programs.of(graph)
    assert right.loss_only is not None
    programs = replace(right, unsynced=faults.scaled_gradient_output(right.unsynced))
    assert failing(graph, "net", programs=programs).program == "no_sync"
    programs = replace(right, loss_only=(faults.scaled_gradient(right.loss_only[0]), right.loss_only[1]))
    assert failing(graph, "net", programs=programs).program == "without tangents"
    programs = replace(right, loss_only=(right.loss_only[0], faults.scaled_gradient_output(right.loss_only[1])))
    assert failing(graph, "net", programs=programs).program == "without tangents, no_sync"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stale_gather_is_found_in_the_second_step(stage, monkeypatch):
    """Parameters gathered for the micro-steps of one step are taken in the next one, too."""
    monkeypatch.setattr(Training, "forget_copies", lambda self: None)
    assert failing(final("net", PLAIN[stage]), "net").program == "second step, no_sync"


@pytest.mark.parametrize(
    ("fault", "name", "stage", "program"),
    [
        (faults.rounded_value, "llama", 3, "synced"),
        (faults.rounded_value, "net", 0, "synced"),
        (faults.rounded_gradient, "net", 0, "synced"),
        (faults.rounded_gradient, "net", 3, "synced"),
        (faults.rounded_gradient, "bf16 net", 2, "small gradients"),
    ],
)
def test_worse_rounding_is_found_in_real_dtypes(fault, name, stage, program):
    graph = fault(final(name, PLAIN[stage]))
    assert examine(known(name), graph) is None
    failure = failing(graph, name, dtype=None)
    assert failure.program == program
    assert "rounding takes it no further than" in failure.message


# --- what is right -----------------------------------------------------------------------------------------------

OFFLOADED = "recompute(keep_bytes=500),offload(num_bytes=1000000,min_bytes=1)"
VALID = [
    ("llama", fusing(RECIPES[0]), 2, 1),
    ("net", RECIPES[1].replace("arena", "arena(always=true)"), 2, 1),
    ("net", RECIPES[2], 4, 2),
    ("llama", fusing(RECIPES[2]).replace("fit", OFFLOADED), 3, 1),
    ("llama", RECIPES[3].replace("fit", OFFLOADED).replace("arena", "arena(always=true)"), 2, 1),
    ("llama", fusing(RECIPES[3]), 4, 2),
    ("net", RECIPES[1], 4, 2),
    ("net", RECIPES[0], 1, 1),
    ("tied", fusing(RECIPES[0]), 4, 2),
    ("tied", fusing(RECIPES[3]).replace("fit", OFFLOADED), 2, 1),
    ("tied", RECIPES[3].replace("fit", OFFLOADED), 2, 1),
    ("mixed stages", RECIPES[3], 3, 1),
    ("convnet", fusing(RECIPES[1]), 2, 1),
    ("convnet", RECIPES[2], 4, 2),
    ("dynamic", fusing(RECIPES[0]), 2, 1),
    ("positions", RECIPES[3], 2, 1),
]


@pytest.mark.parametrize(("name", "recipe", "num_ranks", "num_copies"), VALID)
def test_what_is_right_is_not_refused(name, recipe, num_ranks, num_copies):
    after = parse_recipe(recipe).run(captured(name), context(num_ranks, num_copies=num_copies))
    assert examine(known(name, num_ranks), after) is None


@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_parameters_on_the_host_are_not_refused(offload):
    graph = captured("tied")
    inputs = tuple(replace(i, offload=offload) if i.kind is InputKind.param else i for i in graph.inputs)
    graph = replace(graph, inputs=inputs)
    for stage in (0, 3):
        assert examine(reference(graph, 2), parse_recipe(RECIPES[stage]).run(graph, context(2))) is None


@pytest.mark.parametrize(
    ("name", "recipe", "reduce_dtype"),
    [
        ("bf16", RECIPES[0], None),
        ("bf16", fusing(RECIPES[3]), DType.f32),
        ("bf16 net", RECIPES[2], DType.bf16),
        ("bf16 net", RECIPES[1], None),
        ("bf16 llama", fusing(RECIPES[1]), DType.f32),
        ("net", fusing(RECIPES[2]), None),
        ("tied", fusing(RECIPES[1]), DType.bf16),
    ],
)
def test_what_rounds_as_it_should_is_not_refused(name, recipe, reduce_dtype):
    after = parse_recipe(recipe).run(captured(name), context(2, reduce_dtype))
    assert examine(known(name, dtype=None, reduce_dtype=reduce_dtype), after) is None


# --- runs --------------------------------------------------------------------------------------------------------


def steps(*wrong: tuple[str, Graph]) -> tuple[list[str], list[tuple[str, Graph]], Context]:
    """The graphs of a run of which some are others."""
    there = context(2)
    recording = Recording(captured("net"))
    parse_recipe(PLAIN[1]).run(captured("net"), there, [recording])
    found = [("captured", captured("net")), *((step, graph) for step, graph, _ in recording.steps), *wrong]
    return [step.partition("(")[0] for step, _ in found], found, there


def test_the_first_wrong_graph_of_a_run_is_named():
    graph = faults.not_accumulated(final("net", PLAIN[1]))
    names, found, there = steps(("mine(a=1)", graph), ("dce", replace(graph, name="other")))
    for every in (False, True):
        checked = check_graphs(names, found, there, Options(every=every))
        assert checked.wrong is not None
        assert (checked.wrong.step, checked.wrong.graph, checked.wrong.failure.program) == (
            "mine(a=1)",
            "mine",
            "no_sync",
        )
    assert check_graphs(*steps()[:2], there, Options(micro_steps=1)).wrong is None


def test_one_rank_and_no_backward():
    graph = zgraph.trace(nn.Linear(3, 3).requires_grad_(False), torch.rand(2, 3))
    after = parse_recipe(RECIPES[3]).run(graph, Context(mesh=(Axis("shard", 2),)))
    assert examine(reference(graph, 2), after) is None


@pytest.mark.parametrize("fault", [faults.rounded_gradient, faults.forgotten])
def test_the_program_that_fails_is_enough_to_look_at(fault):
    dtype = None if fault is faults.rounded_gradient else DType.f64
    graph = final("bf16 net", PLAIN[1])
    failure = failing(fault(graph), "bf16 net", dtype)
    there = known("bf16 net", dtype=dtype)
    assert failure.is_like(examine(there, fault(graph), only=failure.program))
    assert examine(there, graph, only=failure.program) is None
