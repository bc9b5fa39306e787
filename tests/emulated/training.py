"""Training on the emulated device, with what its log says: losses, races, and waits of the host."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.emulated import cuda, reference
from tests.emulated.case import Case
from tests.emulated.cuda import Entry
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from zgraph.cost import CostTable, hardware


@dataclass
class Trained:
    """Found in a training.

    Args:
        losses: of each call.
        expected: the same from plain eager training.
        races: that the log has.
        left_out: for each place that asks for waits, the number of races if it did not.
        waiting: functions that ask for waits, and those that call them.
        host_waits: for each step, how often the host waited for the device, by place; the first has the capture too.
        streams: of the device that something ran on.
        num_arena: values in arenas.
        ops: nodes of the plan by their op.
        recordings: of each captured graph what was recorded, and what not and why.
    """

    losses: list[float]
    expected: list[float]
    races: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    host_waits: list[dict[str, int]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    num_arena: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    recordings: tuple[str, ...] = ()


def train(case: Case, *, leaves_out: bool = True) -> Trained:
    """Train on echoes, and look through the log of all steps.

    Args:
        case: the net, and how.
        leaves_out: whether each place that asks for waits is taken for one that does not, in turn.
    """
    torch.compiler.reset()
    model = build(case.net).to("cuda")
    compiled = zgraph.compile(model, mesh=mesh_of(case), **options_of(case))
    optimizer = optimizer_of(case, compiled)
    losses: list[torch.Tensor] = []
    logs: list[list[Entry]] = []
    for step in range(case.num_steps):
        batches = [
            tuple(t.to("cuda") for t in batch(case.net, model, case.seed(step, micro), case.num_rows))
            for micro in range(case.num_micro_steps)
        ]
        with cuda.recorded() as log:
            for micro, inputs in enumerate(batches):
                syncs = case.syncs and micro + 1 == case.num_micro_steps
                with nullcontext() if syncs else zgraph.no_sync(compiled):
                    loss = compiled(*inputs)
                    loss.backward()
                    losses.append(loss.detach())
                    del loss
            if case.evaluates:
                with torch.no_grad():
                    compiled(*batches[0])
            optimizer.step()
            optimizer.zero_grad()
        logs.append(log)
    log = [entry for part in logs for entry in part]
    nodes = [node for entry in zgraph.report(compiled).entries for node in entry.plan.graph.nodes]
    return Trained(
        [float(loss) for loss in losses],
        reference.losses(case),
        [str(race) for race in races(log)],
        without_each_wait(log) if leaves_out else {},
        waiting(log),
        [dict(Counter(f"{e.name} {e.site}".strip() for e in part if e.holds_host)) for part in logs],
        sorted({e.stream for e in log if e.kind == "op" and e.stream >= 0}),
        sum(bool(node.option("at")) for node in nodes),
        dict(Counter(node.op for node in nodes if "." not in node.op)),
        zgraph.report(compiled).cuda_graphs,
    )


def mesh_of(case: Case) -> DeviceMesh:
    """The first ranks, in one line or as copies in a grid."""
    ranks = torch.arange(case.num_shards * case.num_copies)
    if case.num_copies > 1:
        return DeviceMesh("cuda", ranks.view(case.num_copies, -1), mesh_dim_names=("copy", "shard"))
    return DeviceMesh("cuda", ranks)


def options_of(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    if "param_dtype" in options:
        options["param_dtype"] = torch.bfloat16
    if "quick_link" in options:
        options["hardware"] = _quick(options.pop("quick_link"))
    return options


def _quick(name: str) -> CostTable:
    """Hardware whose copies to the host have no latency: all that waits may be moved, small as it is."""
    costs = hardware(name)
    return costs.model_copy(update={"host_link": costs.host_link.model_copy(update={"latency_us": 0.001})})


def optimizer_of(case: Case, model: Any) -> torch.optim.Optimizer:
    if case.optimizer is None:
        return torch.optim.AdamW(model.parameters(), lr=case.rate)
    options = dict(case.optimizer)
    if options.get("state") == "disk":
        options["folder"] = Path(os.environ["XDG_CACHE_HOME"]) / "states"
    return zgraph.optim.AdamW(model.parameters(), lr=case.rate, **options)


def waiting(log: list[Entry]) -> set[str]:
    """Functions that ask for waits, and those that call them."""
    return {name for entry in log if entry.waits for name in entry.stack}


def without_each_wait(log: list[Entry]) -> dict[str, int]:
    """The number of races for each place that asks for waits, if it did not."""
    sites = sorted({entry.site for entry in log if entry.waits and entry.site})
    return {site: len(races(log, lambda entry, site=site: entry.site == site)) for site in sites}
