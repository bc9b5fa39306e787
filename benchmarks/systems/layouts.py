"""Layouts of ranks: which of them compute together, and along which axes; among them the one that "auto" picks."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import models
from benchmarks.systems.base import Role, Step, System, adamw_step

if TYPE_CHECKING:
    from zgraph.cost import Hardware

RANKS_PER_HOST = 2
LINK, PLAN = "ZGRAPH_BENCHMARK_LINK", "ZGRAPH_BENCHMARK_PLAN"
"""Environment variables with the bytes a second of the link between hosts, and the file of the plan of "auto"."""


class LaidOut:
    """Trains a model whose ranks are laid out as options say.

    Args:
        model: the model, compiled.
        words: on how the layout was chosen.

    `batch_rank` is the number of this rank's batch, `num_batches` how many there are.
    """

    def __init__(self, model: nn.Module, words: str = "") -> None:
        from zgraph.compiler.compiled_model import compiled_model

        self.words = words
        ranks = compiled_model(model).session.store.ranks
        self.batch_rank, self.num_batches = ranks.batch_rank, ranks.num_batches
        self.step: Step = adamw_step(model)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)


def hardware(link_bytes_per_s: float, num_ranks: int) -> Hardware:
    """This machine as hosts of two ranks, which share a link between them."""
    from zgraph.cost import hardware as profile

    found = profile("cpu").shaped(max(num_ranks // RANKS_PER_HOST, 1), RANKS_PER_HOST)
    between = found.between.model_copy(update={"bytes_per_s": link_bytes_per_s / RANKS_PER_HOST})
    return found.model_copy(update={"between": between})


def planned(name: str, link_bytes_per_s: float, num_ranks: int) -> Any:
    """The plan of the layout that "auto" picks for a preset and its batch: made once, before any rank is started."""
    import zgraph

    preset = models.preset(name)
    ids = torch.zeros(preset.batch_size, preset.sequence_length, dtype=torch.int64)
    model, hosts = models.build(name, torch.device("cpu")), hardware(link_bytes_per_s, num_ranks)
    return zgraph.plan(model, hardware=hosts, num_ranks=num_ranks, parallel="auto", input_ids=ids, labels=ids)


def prepare(model: nn.Module, device: torch.device, *, layout: str, **options: Any) -> Step:
    import zgraph

    count, words = dist.get_world_size(), ""
    hosts = hardware(float(os.environ[LINK]), count)
    if layout == "hsdp":
        shape = (count // RANKS_PER_HOST, RANKS_PER_HOST)
        options["mesh"] = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if layout == "tensor":
        options["tensor_parallel"] = count
    if layout == "experts":
        options["expert_parallel"] = count
    if layout == "auto":
        options["parallel"] = plan = pickle.loads(Path(os.environ[PLAN]).read_bytes())  # of the benchmark itself
        words = plan.layouts
    return LaidOut(zgraph.compile(model, hardware=hosts, **options), words)


LAYOUTS = (
    System("layout: stage 3", Role.ZGRAPH, 3, partial(prepare, layout="zero"), "zgraph", "zgraph"),
    System("layout: tensor parallel", Role.ZGRAPH, 0, partial(prepare, layout="tensor", stage=0), "zgraph", "zgraph"),
    System("layout: hsdp", Role.ZGRAPH, 3, partial(prepare, layout="hsdp"), "zgraph", "zgraph"),
    System("layout: experts", Role.ZGRAPH, 3, partial(prepare, layout="experts"), "zgraph", "zgraph"),
    System("layout: auto", Role.ZGRAPH, 3, partial(prepare, layout="auto"), "zgraph", "zgraph"),
)
