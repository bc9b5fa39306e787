"""Jobs for tests of what a GPU runs by default: regions, and kernels where they were measured to be faster.

There is no compiler for GPUs here. In Inductor's place a region runs op by op, and what is asked of Inductor, and when,
is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

import zgraph
from tests.emulated import cuda, reference
from tests.emulated.case import Case
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from tests.emulated.training import mesh_of
from zgraph.bridge import private_inductor
from zgraph.bridge.private_inductor import Lowered
from zgraph.compiler import autotune
from zgraph.compiler import build as build_module
from zgraph.compiler.autotune import Measured
from zgraph.ir.external_ops import ROWS
from zgraph.options import settings
from zgraph.runtime.clock import Clock
from zgraph.runtime.region import Region, cut

CASE = Case(net="attending", num_shards=1, num_rows=8, num_steps=2)


@dataclass
class Found:
    """Found in a training by default.

    Args:
        losses: of each step.
        expected: the same from plain eager training.
        races: in the log.
        kernels: that the report names.
        asked: what was asked of Inductor, in order.
        num_kernels: generated kernels in the plan.
        num_inside: those of them that are in regions.
        num_regions: regions that differ.
    """

    losses: list[float]
    expected: list[float]
    races: list[str]
    kernels: str
    asked: list[str]
    num_kernels: int
    num_inside: int
    num_regions: int


@contextmanager
def _inductor(asked: list[str], fastest: str) -> Iterator[None]:
    """Inductor that runs op by op, and candidates of which one is the fastest where it is there, or else op by op."""

    def lowered(function: Callable[..., Any], examples: Any, *, checks_inputs: bool = True) -> Lowered:
        asked.append("lowered" if not checks_inputs else "candidate lowered")
        wait = lambda: asked.append("waited")  # noqa: E731
        return Lowered(lambda args: function(*args), wait if not checks_inputs else lambda: None)

    def measured(nodes: Any, hints: Any, clock: Clock) -> Measured:
        found = fastest if fastest in nodes else "aten"
        return Measured({candidate: 1.0 if candidate == found else 2.0 for candidate in nodes})

    with ExitStack() as stack:
        for owner, name, fake in (
            (settings, "inductor_problem", lambda device: ""),
            (private_inductor, "inductor_problem", lambda device: ""),
            (private_inductor, "lowered", lowered),
            (private_inductor, "warmed", lambda: asked.append("warmed")),
            (build_module, "warm", lambda: asked.append("warm")),
            (autotune, "measured", measured),
            (autotune, "_read", lambda path: {}),
        ):
            stack.enter_context(patch.object(owner, name, fake))
        yield


def train(fastest: str) -> Found:
    """Train with no option that says what runs."""
    torch.compiler.reset()
    asked: list[str] = []
    with _inductor(asked, fastest):
        model: Any = build(CASE.net).to("cuda")
        compiled = zgraph.compile(model, mesh=mesh_of(CASE))
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=CASE.rate)
        losses = []
        with cuda.recorded() as log:
            for step in range(CASE.num_steps):
                inputs = [t.to("cuda") for t in batch(CASE.net, model, CASE.seed(step, 0), CASE.num_rows)]
                asked.append("step")
                loss = compiled(*inputs)
                loss.backward()
                losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
    report = zgraph.report(compiled)
    plan = report.entries[0].plan
    inside = [n for p in (plan.forward, plan.backward) if p for n in _inside([*cut(p, plan.graph)])]
    assert report.regions is not None
    return Found(
        [float(loss) for loss in losses],
        reference.losses(CASE),
        [str(race) for race in races(log)],
        report.kernels,
        asked,
        sum(node.op == ROWS for node in plan.graph.nodes),
        sum(node.op == ROWS for node in inside),
        report.regions.num_different,
    )


def _inside(parts: Sequence[Any]) -> list[Any]:
    return [node for part in parts if isinstance(part, Region) for node in part.nodes]
