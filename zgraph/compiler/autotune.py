"""The fastest candidate for running a group: measured once for each group that differs, on the device at hand.

What was measured is kept in a file for each kind of device and version of torch. The first rank measures and tells the
others, so that all of them choose the same.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, RootModel, ValidationError

from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.private_files import private_folder, read_private, write_private
from zgraph.cost import CostTable
from zgraph.environment import cache_folder
from zgraph.ir import Graph, Node, TensorType, Value
from zgraph.ir.layout import dense_strides
from zgraph.ir.symbols import evaluate
from zgraph.passes import Context
from zgraph.passes.fuse import candidates
from zgraph.passes.fusion.candidates import Candidate
from zgraph.runtime.peers import Peers
from zgraph.runtime.region import Region
from zgraph.runtime.regions import Steps

NUM_WARMUPS = 3
NUM_ROUNDS = 15

NEVER_US = 1e12
"""Time of a candidate that cannot run here, in microseconds."""

FLUSH_BYTES = 256 << 20
"""More than a GPU's L2 cache: what runs finds there only what it wrote itself."""

Times = dict[str, dict[Candidate, float]]
"""Microseconds of each candidate, by the key of a group."""

MAX_BYTES = 16 << 20
"""A file of times that is longer is none of ours: a group takes some 500 bytes."""


class _Kept(RootModel[dict[str, dict[Candidate, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]]):
    """Content of a file of times."""

    model_config = ConfigDict(strict=True)


def tuned(graph: Graph, context: Context, device: torch.device, peers: Peers | None) -> CostTable:
    """Cost table with the times of the candidates for running each group of a graph.

    Args:
        graph: as the pass `fuse` will see it.
        context: the table, and the sizes.
        device: where to measure.
        peers: the other ranks, which all come here; None without any.
    """
    is_first = peers is None or peers.rank == peers.ranks[0]
    times = _kept_or_measured(graph, context, device) if is_first else {}
    if peers is not None:
        times = json.loads(peers.exchange("times", json.dumps(times))[0])
    return context.costs.model_copy(update={"groups": {**context.costs.groups, **times}})


def times_path(device: torch.device) -> Path:
    """Where the times of a device lie: in a folder of this user alone.

    Raises:
        CacheError: it cannot be one.
    """
    kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return private_folder(cache_folder(), "times") / f"{kind}-torch-{torch.__version__}.json"


def _kept_or_measured(graph: Graph, context: Context, device: torch.device) -> Times:
    path = times_path(device)
    kept: Times = _read(path)
    wanted = {found.key: found.nodes for found in candidates(graph, context.hints) if len(found.nodes) > 1}
    missing = {key: nodes for key, nodes in wanted.items() if not nodes.keys() <= kept.get(key, {}).keys()}
    for key, nodes in missing.items():
        kept[key] = measured(nodes, context.hints, device)
    if missing:
        write_private(path, (json.dumps(kept, indent=1) + "\n").encode())
    return {key: kept[key] for key in wanted}


def _read(path: Path) -> Times:
    """Times that were measured before. Empty if the file is missing or none of ours: they are measured again then."""
    held = read_private(path, MAX_BYTES)
    try:
        return {} if held is None else _Kept.model_validate_json(held).root
    except ValidationError:
        return {}


def measured(
    nodes: Mapping[Candidate, Sequence[Node]], hints: Mapping[str, int], device: torch.device
) -> dict[Candidate, float]:
    """The median time of each candidate in microseconds; they take turns. Without a compiler, Inductor has none."""
    wanted = {candidate: some for candidate, some in nodes.items() if candidate != "inductor" or has_inductor(device)}
    runs = {candidate: _prepared(some, hints, device) for candidate, some in wanted.items()}
    clock = _Clock(device)
    for run in [*runs.values()] * NUM_WARMUPS:
        run()
    taken: dict[Candidate, list[float]] = {candidate: [] for candidate in runs}
    for _ in range(NUM_ROUNDS):
        for candidate, run in runs.items():
            taken[candidate].append(clock.us(run))
    return {candidate: median(taken[candidate]) if candidate in taken else NEVER_US for candidate in nodes}


def has_inductor(device: torch.device) -> bool:
    """Whether Inductor can compile for a device: on processors it needs a C++ compiler."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def _prepared(nodes: Sequence[Node], hints: Mapping[str, int], device: torch.device) -> Callable[[], object]:
    """A call of these nodes on random operands."""
    made = {r.name for n in nodes for r in n.results}
    operands = {v.name: v for n in nodes for v in n.operands if v.name not in made}
    steps = Steps(Region(tuple(nodes), tuple(operands.values()), (), ()), device, {})
    given = list(_random(operands.values(), hints, device))
    return lambda: steps([*given])


def _random(values: Iterable[Value], hints: Mapping[str, int], device: torch.device) -> Iterable[torch.Tensor]:
    for value in values:
        kind = value.type
        assert isinstance(kind, TensorType), "kernels read tensors"
        shape = [evaluate(d, hints) for d in kind.shape]
        strides = [evaluate(d, hints) for d in kind.strides or dense_strides(kind.shape)]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = torch.empty(max(extent, 0), dtype=TO_TORCH[kind.dtype], device=device)
        flat = flat.normal_() if flat.is_floating_point() else flat.random_(0, 2)
        yield flat.as_strided(shape, strides)


class _Clock:
    """Times calls on a device, each with nothing in its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(FLUSH_BYTES if device.type != "cpu" else 0, dtype=torch.uint8, device=device)

    def us(self, run: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            began = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - began)
        self.scratch.zero_()
        begin, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))
