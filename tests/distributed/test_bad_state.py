"""State dicts that do not fit: every problem is named, and nothing is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import StateDictError

from .mistakes import Caught, assert_caught, make, train_once
from .nets import Mlp, built, rows
from .pool import Pool

State = dict[str, Any]


def missing(state: State) -> None:
    del state["first.weight"], state["last.bias"]


def misshapen(state: State) -> None:
    state["first.weight"] = torch.zeros(25, 12)
    state["norm.bias"] = torch.zeros(1)


def unexpected(state: State) -> None:
    state["middle.weight"] = torch.zeros(3)


def renamed(state: State) -> None:
    state["first.weigth"] = state.pop("first.weight")


CASES: dict[str, tuple[Callable[[State], None], dict[str, bool], tuple[str, ...]]] = {
    "missing": (missing, {}, ("2 problems", "first.weight is missing", "last.bias is missing")),
    "misshapen": (misshapen, {}, ("first.weight has shape (25, 12), not (24, 12)", "norm.bias has shape (1,)")),
    "misshapen, not strict": (misshapen, {"strict": False}, ("first.weight has shape (25, 12), not (24, 12)",)),
    "unexpected": (unexpected, {}, ("middle.weight is not part of the model",)),
    "renamed": (renamed, {}, ("first.weight is missing (the state dict has first.weigth)",)),
    "assign": (lambda state: None, {"assign": True}, ("assign=False",)),
}


def load_wrongly(mesh: DeviceMesh, stage: int, case: str) -> Caught:
    spoil, options, _ = CASES[case]
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    whole = {name: torch.full_like(value, 0.5) for name, value in built(Mlp)().state_dict().items()}
    state = dict(whole)
    spoil(state)

    def load_rightly() -> None:
        model.load_state_dict(whole)
        train_once(model, rows(mesh.get_local_rank()))

    return make(model, lambda: model.load_state_dict(state, **options), load_rightly)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [1, 3])
def test_state_dicts_that_do_not_fit(pool: Pool, stage: int, case: str) -> None:
    assert_caught(pool.run(load_wrongly, 2, stage, case), StateDictError, "nothing was loaded", *CASES[case][2])


def load_loosely(mesh: DeviceMesh) -> tuple[list[str], list[str]]:
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    found = model.load_state_dict({"last.bias": torch.ones(5), "other": torch.ones(1)}, strict=False)
    assert torch.equal(model.last.bias.full_tensor(), torch.ones(5))
    return sorted(found.missing_keys), found.unexpected_keys


def test_not_strict_loads_what_there_is(pool: Pool) -> None:
    names = sorted(n for n in Mlp().state_dict() if n != "last.bias")
    assert pool.run(load_loosely, 2) == [(names, ["other"])] * 2
