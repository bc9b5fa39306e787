"""Faults put into the runtime on purpose: in the order of streams and the lives of tensors, not in what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.staged_group import StreamGroup, Work
from tests.emulated.cases import CASES
from tests.emulated.training import train
from zgraph.optim import streaming
from zgraph.runtime import collectives, gradients
from zgraph.runtime.host import Copy, CopyLane, HostMemory

Fault = contextlib.AbstractContextManager[Any]

_own_start = StreamGroup._start
_own_future = collectives.Future.__init__
_own_memory = collectives._whole_memory
_own_update = streaming._Visit.update


def _nothing(*args: Any, **kwargs: Any) -> bool:
    return True


def _begun_at_once(self: StreamGroup, name: str, held: Any, move: Any) -> Work:
    with patch.object(torch.cuda.Stream, "wait_stream", _nothing):
        return _own_start(self, name, held, move)


def _copied_at_once(self: CopyLane, target: torch.Tensor, source: torch.Tensor) -> Copy:
    with patch.object(torch.cuda.Stream, "wait_stream", _nothing):
        return _own_copy(self, target, source)


_own_copy = CopyLane.start


@contextlib.contextmanager
def _after_nothing(self: HostMemory, copies: Any) -> Iterator[None]:
    yield


def _memory_of_the_copy_stream(node: Any, session: Any) -> Callable[..., list[torch.Tensor]]:
    empty = _own_memory(node, session)

    def made(chunks: Any, arena: Any) -> list[torch.Tensor]:
        with torch.cuda.stream(session.host.to_device.stream):
            return empty(chunks, arena)

    return made


def _holding_nothing(self: Any, name: str, work: Any, held: Any, finish: Any) -> None:
    _own_future(self, name, work, None, finish)


def _letting_go(self: Any, update: Any) -> list[tuple[Copy, None]]:
    return [(copy, None) for copy, _ in _own_update(self, update)]


FAULTS: dict[str, tuple[Callable[[], Fault], str]] = {
    "collectives do not wait for what computes": (
        lambda: patch.object(StreamGroup, "_start", _begun_at_once),
        "stage 3, arena",
    ),
    "nobody waits for collectives": (lambda: patch.object(Work, "wait", _nothing), "stage 3, arena"),
    "copies do not wait for what computes": (
        lambda: patch.object(CopyLane, "start", _copied_at_once),
        "offload activations",
    ),
    "nobody waits for copies": (lambda: patch.object(Copy, "wait", _nothing), "offload activations"),
    "the host does not wait for gradients": (
        lambda: patch.object(CopyLane, "synchronize", _nothing),
        "offload optimizer, stage 1",
    ),
    "gathers do not wait for chunks from the host": (
        lambda: patch.object(HostMemory, "after", _after_nothing),
        "offload parameters, stage 3",
    ),
    "gathered memory is the copy stream's": (
        lambda: patch.object(collectives, "_whole_memory", _memory_of_the_copy_stream),
        "offload parameters, stage 3",
    ),
    "memory that is copied from is free at once": (
        lambda: patch.object(collectives.Future, "__init__", _holding_nothing),
        "offload activations",
    ),
    "memory of updates is free before they have left": (
        lambda: patch.object(streaming._Visit, "update", _letting_go),
        "states on the host",
    ),
    "the host updates what is still read": (
        lambda: patch.object(CopyLane, "settle", _nothing),
        "offload parameters, evaluated",
    ),
    "updates that torch does not count": (
        lambda: patch.object(gradients.private_runtime, "bump_version", _nothing),
        "averaged by the optimizer, stage 1",
    ),
}
"""A fault, and the name of a case that it spoils."""


def spoiled(name: str) -> tuple[list[str], bool]:
    """The races of the case with the fault in it, and whether its losses are still right."""
    put_in, case = FAULTS[name]
    with put_in():
        found = train(CASES[case], leaves_out=False)
    return found.races, all(
        abs(one - other) < 1e-4 * abs(other) for one, other in zip(found.losses, found.expected, strict=True)
    )
