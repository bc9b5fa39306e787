"""Jobs for tests of programs that the device repeats from recordings (CUDA graphs)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.emulated import cuda
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from tests.emulated.training import waiting, without_each_wait
from zgraph.bridge import private_graphs
from zgraph.runtime import replays

RATE = 1e-2


def compiled_pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A net that is recorded, and one with the same values that is not."""
    plain = build(name).to("cuda")
    recorded = copy.deepcopy(plain)
    options = {"stage": 0, "mesh": _alone(), **options}
    return zgraph.compile(recorded, cuda_graphs=True, **options), zgraph.compile(plain, **options)


def _alone() -> DeviceMesh:
    return DeviceMesh("cuda", [0])


def inputs_of(name: str, model: nn.Module, seed: int, num_rows: int = 16) -> list[torch.Tensor]:
    return [t.to("cuda") for t in batch(name, model, seed, num_rows)]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def said(model: Any) -> str:
    """What the report says of recordings."""
    return "\n".join(zgraph.report(model).cuda_graphs)


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of two lists of tensors."""
    assert len(one) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


# --- who holds what ---------------------------------------------------------------------------------------------


def two_forwards_first(name: str) -> tuple[float, str]:
    """Difference of gradients where two forwards come before their backwards, after replays of both."""
    recorded, plain = compiled_pair(name)
    for model in (recorded, plain):
        for seed in range(4):
            model(*inputs_of(name, model, seed)).backward()
        model.zero_grad()
        losses = [model(*inputs_of(name, model, seed)) for seed in (10, 11)]
        for loss in losses:
            loss.backward()
        for seed in (12, 13):
            model(*inputs_of(name, model, seed)).backward()
    return distance(gradients(recorded), gradients(plain)), said(recorded)


def kept_results(name: str) -> tuple[float, str]:
    """Difference of losses and gradients that somebody keeps while the device repeats the program."""
    recorded, plain = compiled_pair(name)
    kept: list[list[torch.Tensor]] = []
    for model in (recorded, plain):
        found: list[torch.Tensor] = []
        for seed in range(7):
            loss = model(*inputs_of(name, model, seed))
            loss.backward()
            found += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            model.zero_grad()
        kept.append(found)
    return distance(*kept), said(recorded)


def gradients_that_add_up(name: str) -> tuple[float, str]:
    """Difference of gradients that are never set to None."""
    recorded, plain = compiled_pair(name)
    for model in (recorded, plain):
        for seed in range(6):
            model(*inputs_of(name, model, seed)).backward()
    return distance(gradients(recorded), gradients(plain)), said(recorded)


def two_backwards(name: str) -> tuple[float, str]:
    """Difference of gradients where the graph is kept for a second backward."""
    recorded, plain = compiled_pair(name)
    for model in (recorded, plain):
        for seed in range(5):
            loss = model(*inputs_of(name, model, seed))
            loss.backward(retain_graph=True)
            loss.backward()
    return distance(gradients(recorded), gradients(plain)), said(recorded)


def recorded_one_by_one(name: str) -> tuple[float, str]:
    """Difference of gradients where the backward under no_sync is recorded long after the forward."""
    recorded, plain = compiled_pair(name)
    for model in (recorded, plain):
        for seed in range(10):
            with contextlib.nullcontext() if seed < 5 else zgraph.no_sync(model):
                model(*inputs_of(name, model, seed)).backward()
    return distance(gradients(recorded), gradients(plain)), said(recorded)


def draws() -> tuple[float, str]:
    """Difference of losses with dropout, of the same seed."""
    found, texts = [], []
    for records in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 16), nn.Dropout(0.5)).cuda()
        model: Any = zgraph.compile(net, stage=0, mesh=_alone(), cuda_graphs=records)
        torch.manual_seed(1)
        losses = []
        for _ in range(7):
            loss = model(torch.ones(8, 16, device="cuda")).square().mean()
            loss.backward()
            losses.append(loss.detach())
        found.append(losses)
        texts.append(said(model))
    assert len({float(loss) for loss in found[0]}) == len(found[0])
    return distance(*found), texts[0]


def inference() -> tuple[float, str]:
    """Difference of outputs that somebody keeps, with gradients off in two ways, of two sizes in turn."""
    recorded, plain = compiled_pair("mlp", dynamic=False)
    kept: list[list[torch.Tensor]] = []
    for model in (recorded, plain):
        found = []
        for seed in range(10):
            off, num_rows = ((torch.no_grad, 16), (torch.inference_mode, 8))[seed % 2]
            with off():
                found.append(model(*inputs_of("mlp", model, seed, num_rows)))
        kept.append(found)
    return distance(*kept), said(recorded)


def another_stream(name: str) -> tuple[list[str], dict[str, int], set[str], float]:
    """Races of steps in turns on two streams, those without each wait, who waits, and the difference of losses."""
    recorded, plain = compiled_pair(name)
    side = torch.cuda.Stream()
    batches = [inputs_of(name, plain, seed) for seed in range(8)]
    side.wait_stream(torch.cuda.current_stream())
    losses: list[list[torch.Tensor]] = []
    with cuda.recorded() as log:
        for model in (recorded, plain):
            found = []
            for number, inputs in enumerate(batches):
                with torch.cuda.stream(side) if number % 2 else contextlib.nullcontext():
                    loss = model(*inputs)
                    loss.backward()
                    found.append(loss.detach())
                    model.zero_grad()
                    del loss
            losses.append(found)
    return [str(race) for race in races(log)], without_each_wait(log), waiting(log), distance(*losses)


# --- what goes wrong --------------------------------------------------------------------------------------------


def cannot_be_recorded(name: str) -> tuple[float, str]:
    """Difference of losses where every recording fails."""

    def fails(run: Callable[[], Any], pool: Any, device: torch.device) -> Any:
        return _own_recorded(lambda: (run(), torch.ones(2, device="cuda").sum().item()), pool, device)

    with patch.object(private_graphs, "recorded", fails):
        return kept_results(name)


_own_recorded = private_graphs.recorded


def fails_while_it_is_recorded(name: str) -> tuple[float, str]:
    """Difference of losses after an error between two recordings of a program."""
    recorded, plain = compiled_pair(name)
    own, raised = replays._Stretch._record, []

    def record(self: Any, args: list[Any]) -> list[Any]:
        made = own(self, args)
        if not raised:
            raised.append(True)
            raise KeyboardInterrupt
        return made

    losses: list[list[torch.Tensor]] = []
    for model in (recorded, plain):
        found = []
        for seed in range(8):
            with contextlib.suppress(KeyboardInterrupt), patch.object(replays._Stretch, "_record", record):
                found.append(model(*inputs_of(name, model, seed)))
                found[-1].backward()
            if len(found) <= seed:
                found.append(model(*inputs_of(name, model, seed)))
                found[-1].backward()
        losses.append(found)
    assert raised
    return distance(*losses), said(recorded)


@contextlib.contextmanager
def _nothing_copied() -> Iterator[None]:
    with patch.object(replays._Copied, "takes", lambda self, given: True):
        yield


@contextlib.contextmanager
def _results_as_they_are() -> Iterator[None]:
    with patch.object(private_graphs, "copies", lambda tensors: [t.detach() for t in tensors]):
        yield


@contextlib.contextmanager
def _nobody_asks_who_holds() -> Iterator[None]:
    with patch.object(replays.Waiting, "are_held", property(lambda self: False)):
        yield


@contextlib.contextmanager
def _addresses_not_compared() -> Iterator[None]:
    with patch.object(replays._Fixed, "takes", lambda self, given: True), _nobody_asks_who_holds():
        yield


@contextlib.contextmanager
def _not_replayed_at_first() -> Iterator[None]:
    own = replays._Stretch._recorded

    def recorded(self: Any, args: Any) -> str:
        problem = own(self, args)
        self.graph = _Late(self.graph)  # type: ignore[assignment]
        return problem

    with patch.object(replays._Stretch, "_recorded", recorded):
        yield


class _Late:
    """A recording whose first replay does nothing."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.begun = graph, False

    def replay(self) -> None:
        if self.begun:
            self.graph.replay()
        self.begun = True


@contextlib.contextmanager
def _nothing_is_owned() -> Iterator[None]:
    own = replays._Leaving.of

    def of(program: Any, results: Any) -> Any:
        leaving = own(program, results)
        leaving.owners.update({at: private_graphs.alias(owner) for at, owner in leaving.owners.items()})
        return leaving

    with patch.object(replays._Leaving, "of", of):
        yield


FAULTS: dict[str, tuple[Callable[[], Any], Callable[..., tuple[float, str]]]] = {
    "inputs are not copied": (_nothing_copied, kept_results),
    "results are not copied": (_results_as_they_are, kept_results),
    "nobody asks who holds what waits": (_nobody_asks_who_holds, two_forwards_first),
    "addresses are not compared": (_addresses_not_compared, two_forwards_first),
    "the run that is recorded is not replayed": (_not_replayed_at_first, kept_results),
    "memory of what waits is given to others": (_nothing_is_owned, recorded_one_by_one),
}
"""A fault, and the job that it spoils."""


def spoiled(name: str) -> float:
    """Difference that a fault makes."""
    put_in, job = FAULTS[name]
    with put_in():
        return job("residual")[0]
