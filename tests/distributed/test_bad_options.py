"""What `zgraph.compile` must refuse, on every rank, before it changes the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import AlreadyCompiledError, ContractError, DtypeError, RecipeError, UsageError, ZgraphError

from .mistakes import Caught, assert_caught, make, train_once
from .nets import Mlp, built, rows
from .pool import Pool


def wrong_stage(name: str) -> int:
    return 7 if name == "last.bias" else 3


OPTIONS: dict[str, tuple[dict[str, Any], type[ZgraphError], tuple[str, ...]]] = {
    "stage 4": ({"stage": 4}, UsageError, ("0, 1, 2 or 3", "4")),
    "stage -1": ({"stage": -1}, UsageError, ("0, 1, 2 or 3", "-1")),
    "stage True": ({"stage": True}, UsageError, ("0, 1, 2 or 3", "True")),
    "stage text": ({"stage": "3"}, UsageError, ("0, 1, 2 or 3", "'3'")),
    "stage float": ({"stage": 2.0}, UsageError, ("0, 1, 2 or 3", "2.0")),
    "stage list": ({"stage": [3]}, UsageError, ("0, 1, 2 or 3", "[3]")),
    "stage None": ({"stage": None}, UsageError, ("0, 1, 2 or 3", "None")),
    "stage by name": ({"stage": wrong_stage}, UsageError, ("0, 1, 2 or 3", "7", "last.bias")),
    "param_dtype": ({"param_dtype": torch.int32}, DtypeError, ("floating-point", "torch.int32")),
    "reduce_dtype": ({"reduce_dtype": torch.int8}, DtypeError, ("floating-point", "torch.int8")),
    "no such pass": ({"passes": "canonicalise,dce"}, RecipeError, ("did you mean canonicalize?", "\n  ^")),
    "no such option": ({"passes": "partition(stag=3)"}, RecipeError, ("did you mean stage?", "\n            ^")),
    "bad value": ({"passes": "dce,partition(stage=7)"}, RecipeError, ("0, 1, 2 or 3", "\n      ^")),
    "no comma": ({"passes": "canonicalize dce"}, RecipeError, ("comma", "\n               ^")),
    "open parenthesis": ({"passes": "partition(stage=3"}, RecipeError, ("parenthesis", "\n                   ^")),
    "wrong order": ({"passes": "all-gather,partition"}, ContractError, ("all-gather", "partition before it")),
    "no partition": ({"passes": "canonicalize,dce"}, ContractError, ("partition",)),
}


def give_options(mesh: DeviceMesh, case: str) -> Caught:
    model = built(Mlp)()

    def compile_rightly() -> None:
        train_once(zgraph.compile(model, stage=3, mesh=mesh), rows(mesh.get_local_rank()))

    return make(model, lambda: zgraph.compile(model, mesh=mesh, **OPTIONS[case][0]), compile_rightly)


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_mean_nothing(pool: Pool, case: str) -> None:
    _, error, words = OPTIONS[case]
    assert_caught(pool.run(give_options, 2, case), error, *words)


def compile_twice(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    zgraph.compile(model, stage=2, mesh=mesh)
    return model


def compile_a_part(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    zgraph.compile(model.last, stage=2, mesh=mesh)
    return model


def make_an_optimizer(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model


def make_no_model(model: nn.Module, mesh: DeviceMesh) -> Any:
    return model.forward


STATES: dict[str, tuple[Callable[[nn.Module, DeviceMesh], Any], type[ZgraphError], tuple[str, ...]]] = {
    "compiled twice": (compile_twice, AlreadyCompiledError, ("build a new model",)),
    "a part is compiled": (compile_a_part, AlreadyCompiledError, ("last", "outermost")),
    "optimizer made before": (make_an_optimizer, UsageError, ("SGD", "make the optimizer after")),
    "no module": (make_no_model, UsageError, ("a module", "method")),
}


def compile_in_state(mesh: DeviceMesh, case: str) -> Caught:
    model = built(Mlp)()
    given = STATES[case][0](model, mesh)
    return make(model, lambda: zgraph.compile(given, stage=3, mesh=mesh))


@pytest.mark.parametrize("case", STATES)
def test_models_that_cannot_be_compiled(pool: Pool, case: str) -> None:
    _, error, words = STATES[case]
    assert_caught(pool.run(compile_in_state, 2, case), error, *words)


def ask_too_early(mesh: DeviceMesh, ask: str) -> Caught:
    model = built(Mlp)()
    act = {"report": zgraph.report, "no_sync": lambda m: zgraph.no_sync(m).__enter__()}[ask]
    return make(model, lambda: act(model), lambda: act(zgraph.compile(model, mesh=mesh)))


@pytest.mark.parametrize("ask", ["report", "no_sync"])
def test_asking_a_model_that_is_not_compiled(pool: Pool, ask: str) -> None:
    assert_caught(pool.run(ask_too_early, 2, ask), UsageError, "call zgraph.compile(model) first")


def lower_half(mesh: DeviceMesh) -> Caught:
    model = zgraph.compile(built(Mlp)(), mesh=mesh, passes="canonicalize,partition(stage=3),dce")
    return make(model, lambda: model(*rows(0)))


def test_a_recipe_that_leaves_a_reshard_says_what_to_add(pool: Pool) -> None:
    assert_caught(pool.run(lower_half, 2), ContractError, "all-gather", "after partition")
