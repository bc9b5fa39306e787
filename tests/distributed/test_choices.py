"""Choices of each rank before the ranks first communicate: if one fails at it, all have an error at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.patience import slowness
from zgraph.cost.hardware import FOLDER
from zgraph.errors import ConfigError, HardwareError, PeerError, PlacementError, PlanMismatchError, UsageError

from . import tensor_zoo as zoo
from .lockstep import local
from .pool import Pool

Said = tuple[str, str, float]


def caught(action: Any) -> Said:
    """The error's class and text, and the seconds until it came."""
    began = time.monotonic()
    try:
        action()
    except (UsageError, HardwareError, PeerError, PlanMismatchError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("nothing was raised")


def failing(what: str) -> Any:
    return patch(what, side_effect=PlacementError("nothing divides; take another number of ranks"))


def choose_apart(mesh: DeviceMesh, folder: str) -> dict[str, Said]:
    """Errors where rank 1 alone fails to choose, or chooses something else; and that all goes on after it."""
    is_other, found = mesh.get_rank() == 1, {}
    own = Path(folder) / f"of rank {mesh.get_rank()}.toml"
    if not is_other:
        own.write_text(FOLDER.joinpath("h100.toml").read_text())
    found["a file"] = caught(lambda: zgraph.compile(zoo.builder("llama")(), hardware=str(own), tensor_parallel=2))
    for name, what, options in (
        ("a layout", "zgraph.estimate.layouts.best_layout", {"parallel": "auto"}),
        ("placements", "zgraph.options.settings.searched", {"tensor_parallel": 2, "placements": "auto"}),
    ):
        with failing(what) if is_other else failing("zgraph.errors.ConfigError"):
            found[name] = caught(lambda options=options: zgraph.compile(zoo.builder("llama")(), **options))
    together = 2 if is_other else 1
    found["axes"] = caught(lambda: zgraph.compile(zoo.builder("llama")(), tensor_parallel=together))
    found["inference"] = caught(lambda: zgraph.infer(zoo.builder("llama")(), tensor_parallel=together))
    config = {"train_micro_batch_size_per_gpu": "one" if is_other else 1}
    found["a configuration"] = caught(
        lambda: zgraph.initialize_engine(model=zoo.builder("llama")(), config=config, mesh=mesh)
    )
    model = zgraph.compile(zoo.builder("llama")(), tensor_parallel=2)
    model(**zoo.batch("llama", 0)).loss.backward()
    assert all(local(p.grad).isfinite().all() for p in model.parameters())
    return found


def test_what_one_rank_fails_to_choose_is_an_error_on_all(pair: Pool, tmp_path: Path) -> None:
    first, other = pair.run(choose_apart, 2, str(tmp_path))
    kinds = {
        "a file": (HardwareError, "toml"),
        "a layout": (PlacementError, "take another number of ranks"),
        "placements": (PlacementError, "take another number of ranks"),
        "a configuration": (ConfigError, "train_micro_batch_size_per_gpu"),
    }
    for name, (kind, words) in kinds.items():
        assert other[name][0] == kind.__name__
        assert first[name][0] == "PeerError"
        assert words in other[name][1]
        assert f"{kind.__name__} on rank 1" in first[name][1]
        assert words in first[name][1]
    for found in (first, other):
        assert found["axes"][0] == "PlanMismatchError"
        assert "'tensor': 1" in found["axes"][1]
        assert "'tensor': 2" in found["axes"][1]
        assert found["inference"][0] == "PlanMismatchError"
        assert "tensor_parallel=1" in found["inference"][1]
        assert "tensor_parallel=2" in found["inference"][1]
    assert max(seconds for found in (first, other) for _, _, seconds in found.values()) < 20 * slowness()


def alone(mesh: DeviceMesh) -> str:
    return caught(lambda: zgraph.compile(zoo.builder("llama")(), mesh=mesh, stage=7))[0]


def test_one_rank_with_a_mesh_of_its_own_chooses_alone(pair: Pool) -> None:
    assert pair.run(alone, 1) == ["UsageError"]
