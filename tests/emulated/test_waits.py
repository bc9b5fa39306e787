"""Every wait of the runtime is needed: left out, it leaves a race. And no fault in the order of streams goes unseen."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.deep import DEEP, deep
from tests.emulated import registered, snippets
from tests.emulated.cases import CASES, OFTEN
from tests.emulated.sabotage import FAULTS, spoiled
from tests.emulated.server import Server
from tests.emulated.sites import waits
from tests.emulated.training import Trained

NEEDLESS = {
    "Clock.synchronize < Clock._seconds < Clock.__init__": "the host reads a time, and no memory",
    "Clock.synchronize < Clock._seconds < Clock.seconds": "the host reads a time, and no memory",
    "Clock.synchronize < Clock.host_s < measured.<genexpr>": "the host reads a time, and no memory",
    "Clock.synchronize < _failing_into < measured": "a kernel's failure is waited for, and no memory read",
    "_is_over < Watch._look_at_device < Watch.look": "the heartbeat asks whether the device goes on",
    "CopyLane.settle < WorkingCopies.settle < WorkingCopies.refresh": "an optimizer has waited, other writes not",
    "CopyLane.start < WorkingCopies._bring < WorkingCopies.refresh": "the host has waited for the last gradients",
    "start-of-all_reduce < _GatheredModel.reduced < _AttachWhole.backward": "flags come by a copy that blocks",
    "Future.result < Copy.synchronize < stream.work_off": "one thread writes, so the last write's end is that of all",
    "start-of-all_reduce < Unused.of_this_backward < _backward.backward": "flags come by a copy that blocks",
}
"""Waits that are left out without a race, and why."""

ELSEWHERE = {
    "Transfer.wait": "gloo on processors",
    "Lane.close": "gloo on processors",
    "Job.finish": "gloo on processors",
    "Peers._poll": "gloo on processors",
    "Meetings._await": "a key of the store: no case compares",
    "Meetings.told": "a key of the store: no case serves",
    "Meetings._smallest": "a key of the store: no case is out of memory",
    "_Rendezvous._blame": "a key of the store: no case joins",
    "_Rendezvous._ruling": "a key of the store: no case joins",
    "HostMemory.after": "on a GPU the copy stream itself goes on: see the faults",
    "HostPool.release": "blocks of a host that is full",
    "Later.__float__": "a number of the engine's: see test_host_waits",
    "Pieces._write_back": "eager code between pieces, in no case",
    "checked_loading.load_state_dict": "no case loads",
    "settle_host_memory": "no case loads or writes a checkpoint",
    "Checkpoints.close": "the thread that writes files",
    "Checkpoints.load": "the thread that writes files",
    "Checkpoints.save": "the thread that writes files",
    "Checkpoints.wait": "the thread that writes files",
    "Engine.wait_for_checkpoint": "the thread that writes files",
    "Copies.close": "the thread that copies to memory",
    "Copies.make": "the thread that copies to memory",
    "Copies.wait": "the thread that copies to memory",
    "CollectiveTimes._alone": "a time",
    "Monitoring._synchronize": "a time",
    "Recorder.runs_us": "a time",
    "Libraries.begin.ready": "a compiler of C++, on processors alone",
    "exchange.run": "a time",
    "LocalSteps._take": "the thread of means between replicas, in no case",
    "Travel.mean": "the same thread's own stream",
    "_joined.joined": "expert parallelism, in no case: the wait is the batches' own",
    "Background.wait": "the thread that writes files",
    "Staging.take": "the thread that writes files",
    "Between._wait": "gloo between replicas, in no case",
    "_Aside.run": "gloo between replicas, in no case",
    "_let_go.end": "gloo between replicas, in no case",
    "Line.ask": "the store of an elastic job, in no case",
    "Pulse.run": "the store of an elastic job, in no case",
    "ring_attention.shift.come": "attention of processors: on GPUs keys do not go round",
    "Alike._finish": "tensor parallelism, in no case: the wait is the comparison's own",
}
"""Functions that wait for no stream, or for one whose memory nobody reads, by what for."""

FAULTS_OFTEN = (
    "copies do not wait for what computes",
    "gathered memory is the copy stream's",
    "memory of updates is free before they have left",
    "the host updates what is still read",
    "updates that torch does not count",
)


Waits = tuple[dict[str, Counter[str]], set[str]]


@pytest.fixture(scope="module")
def seen(trained: Callable[[str], Trained], echoes: Server) -> Waits:
    """For each place that asks for waits, the races of each case if it did not; and functions that wait."""
    each = {name: (trained(name).left_out, trained(name).waiting) for name in (CASES if DEEP else OFTEN)}
    for job in (snippets.muon, snippets.two_heads, registered.another_stream):
        races, *each[job.__name__] = echoes.run(job)
        assert races == []
    found: dict[str, Counter[str]] = {}
    for name, (left_out, _) in each.items():
        for site, num_races in left_out.items():
            found.setdefault(site, Counter())[name] = num_races
    return found, set().union(*(functions for _, functions in each.values()))


def test_a_wait_that_is_left_out_is_found(seen: Waits) -> None:
    left_out, _ = seen
    missed = {site for site, races in left_out.items() if not any(races.values())}
    assert missed - NEEDLESS.keys() == set()
    assert NEEDLESS.keys() <= left_out.keys()
    assert sum(n > 0 for races in left_out.values() for n in races.values()) >= 150


def test_every_place_that_waits_is_seen_or_needs_no_look(seen: Waits) -> None:
    _, functions = seen
    assert waits().keys() - functions == ELSEWHERE.keys()


@pytest.mark.parametrize("name", [*FAULTS_OFTEN, *(deep(name) for name in FAULTS if name not in FAULTS_OFTEN)])
def test_a_fault_is_found(echoes: Server, name: str) -> None:
    races, is_right = echoes.run(spoiled, name)
    assert races or not is_right
