"""Generated kernels on several ranks: the training is DDP's, up to the rounding that kernels leave out."""

import json
import os
import time
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
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


@dataclass
class Tuned:
    """What tuning made of a model on one rank.

    Args:
        groups: the times, as text.
        num_measured: groups that this rank has measured.
        num_files: in its cache.
        state: of torch's generator afterwards.
    """

    groups: str
    num_measured: int
    num_files: int
    state: int


def tune(mesh: DeviceMesh, folder: str, evaluates: bool, slow_s: float = 0.0) -> Tuned:
    """Each rank with a cache of its own, as on a host of its own; the last rank may be slow."""
    rank = mesh.get_rank()
    counted: list[int] = []
    measure = autotune.measured

    def measured(*args: Any) -> autotune.Measured:
        counted.append(1)
        if rank and len(counted) == 1:
            time.sleep(slow_s)
        return measure(*args)

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"XDG_CACHE_HOME": f"{folder}/{rank}"}))
        stack.enter_context(patch.object(autotune, "has_inductor", return_value=False))
        stack.enter_context(patch.object(autotune, "measured", measured))
        model = zgraph.compile(zoo.builder("vit")(), mesh=mesh, kernels="triton")
        compiled = compiled_model(model)
        compiled.tunes = True
        if slow_s:
            compiled.session.peers.limit_s = slow_s / 4
        inputs = zoo.batch("vit", rank)
        torch.manual_seed(0)
        if evaluates:
            with torch.no_grad():
                model(**inputs)
        model(**inputs).loss.backward()
        files = list(Path(folder, str(rank)).glob("**/*.json"))
        groups = json.dumps(compiled.context.costs.groups, sort_keys=True)
        return Tuned(groups, len(counted), len(files), zlib.crc32(torch.get_rng_state().numpy().tobytes()))


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_ranks_share_what_is_to_be_measured_and_choose_alike(pool: Pool, tmp_path: Path, evaluates: bool) -> None:
    """Whether an evaluation comes first or not."""
    first, other = pool.run(tune, 2, str(tmp_path), evaluates)
    groups = json.loads(first.groups)
    assert first.groups == other.groups
    assert first.num_measured + other.num_measured == len(groups)
    assert abs(first.num_measured - other.num_measured) <= 1 + evaluates
    assert (first.num_files, other.num_files) == (1, 0)
    again, _ = pool.run(tune, 2, str(tmp_path), evaluates)
    assert again.groups == first.groups
    assert again.num_measured == 0
    assert {t.state for t in (first, other, again)} == {first.state}, "random numbers are as if nothing was measured"


def test_a_rank_that_measures_for_long_is_waited_for(pool: Pool, tmp_path: Path) -> None:
    """Longer than ZGRAPH_TIMEOUT: compilers take their time, and it lives."""
    first, other = pool.run(tune, 2, str(tmp_path), False, 8.0)
    assert first.groups == other.groups
