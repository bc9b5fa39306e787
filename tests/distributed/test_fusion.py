"""Generated kernels on several ranks: the training is DDP's, up to the rounding that kernels leave out."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.compiler import autotune
from zgraph.compiler.compiled_model import compiled_model

from . import zoo
from .lockstep import Lockstep, assert_same
from .pool import Pool


def train(mesh: DeviceMesh, name: str, stage: int) -> tuple[tuple[float, float], int]:
    pair = Lockstep(mesh, zoo.builder(name), stage=stage, kernels="triton")
    for step in range(5):
        pair.step(zoo.batch(name, 100 * step + pair.rank))
    (entry,) = zgraph.report(pair.ours.model).entries
    return pair.errors, sum(n.op == "zgraph.rows.default" for n in entry.plan.graph.nodes)


@pytest.mark.parametrize(("name", "stage"), [("llama", 0), ("llama", 3), ("vit", 2), ("mixtral", 3)])
def test_training_with_kernels_is_that_of_ddp(pool: Pool, name: str, stage: int) -> None:
    answers = pool.run(train, 2, name, stage)
    assert_same([errors for errors, _ in answers])
    assert all(num_kernels > 4 for _, num_kernels in answers)


def tune(mesh: DeviceMesh, folder: str) -> tuple[str, int]:
    """Each rank with a cache of its own, as on a host of its own."""
    rank = mesh.get_rank()
    cache = patch.dict(os.environ, {"XDG_CACHE_HOME": f"{folder}/{rank}"})
    with cache, patch.object(autotune, "has_inductor", return_value=False):
        model = zgraph.compile(zoo.builder("vit")(), mesh=mesh, kernels="triton")
        compiled = compiled_model(model)
        compiled.tunes = True
        inputs = zoo.batch("vit", rank)
        model(**inputs).loss.backward()
        files = list(Path(folder, str(rank)).glob("**/*.json"))
        return json.dumps(compiled.context.costs.groups, sort_keys=True), len(files)


def test_all_ranks_choose_by_what_the_first_has_measured(pool: Pool, tmp_path: Path) -> None:
    (first, kept), (other, not_kept) = pool.run(tune, 2, str(tmp_path))
    assert json.loads(first)
    assert first == other
    assert (kept, not_kept) == (1, 0)
