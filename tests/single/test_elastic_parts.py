"""Parts of an elastic job, around a real store in this process: who dies half-way, comes back, or is late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.single.elastic_parts import Held, net
from zgraph.bridge.private_runtime import PrefixStore, tcp_store
from zgraph.environment import ElasticPlace
from zgraph.errors import PeerError, StateDictError, UsageError
from zgraph.optim.elastic import Elastic
from zgraph.optim.gradients import FlatBuffers
from zgraph.runtime.admission import FINISHED, Admission
from zgraph.runtime.generations import JOINERS, NO, YES, Generation, Generations
from zgraph.runtime.proposals import Proposals
from zgraph.runtime.pulse import GONE, PREFIX, Line, Member, Pulse, beat_key, say_gone
from zgraph.runtime.questions import claim

GONE_S = 0.4


class Around:
    """A store, and those that ask it."""

    def __init__(self) -> None:
        self._server, self.port = tcp_store("localhost", 0, timedelta(seconds=30), serves=True)
        self.store = PrefixStore(PREFIX, self._server)
        self.pulses: list[Pulse] = []

    def seen_by(self, replica: int, shard: int = 0, num_shards: int = 1) -> Generations:
        line = Line("localhost", self.port)
        self.pulses.append(Pulse(line, GONE_S))
        found = Generations(line, self.pulses[-1], shard, num_shards, 5.0)
        found.own = Member(replica, 1)
        return found

    def replica(self, number: int, model: nn.Module, **options: Any) -> Elastic:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        place = ElasticPlace("localhost", self.port, number, 1, 2, GONE_S)
        run = Elastic(model, optimizer, place, options.pop("state", {}), False, **options)
        self.pulses.append(run._pulse)
        return run


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Iterator[Around]:
    monkeypatch.setenv("ZGRAPH_TIMEOUT", "10")
    made = Around()
    yield made
    for pulse in made.pulses:
        pulse.stop()


def made(number: int, members: tuple[Member, ...], step: int = 0, heard: int = 0) -> Generation:
    return Generation(number, members, members[1:], members[0], step, heard, "for a test")


# --- who dies half-way -----------------------------------------------------------------------------------------------


def test_places_are_taken_without_gaps(around: Around) -> None:
    lines = [Line("localhost", around.port) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        words = [
            pool.submit(line.ask, lambda store, at=at: claim(store, "list", 0, str(at)))  # type: ignore[misc]
            for at, line in enumerate(lines * 4)
        ]
    assert sorted(word.result() for word in words) == [*range(1, 17)]


def test_who_dies_while_it_asks_to_join_blocks_nobody(around: Around) -> None:
    claim(around.store, JOINERS, 0, "[0, 1]")  # and no more: it is dead
    later = around.seen_by(1)
    later.register(Member(1, 1))
    assert later.waiting(0) == ([Member(0, 1), Member(1, 1)], 2)
    assert later.waiting(2) == ([], 2)
    assert later.judge([Member(0, 1), Member(1, 1)]).keys() == {Member(0, 1)}


def test_who_dies_while_it_tells_of_an_end_hides_no_other(around: Around) -> None:
    generations = around.seen_by(0)
    generations.pulse.follow(beat_key(Member(0, 1), 0), "")
    claim(around.store, GONE, 0, '[[1, 1], "killed"]')
    say_gone(around.store, Member(2, 1), "stopped")
    until = time.monotonic() + 5
    while len(generations.pulse.gone) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert generations.pulse.gone == {Member(1, 1): "killed", Member(2, 1): "stopped"}


def test_the_last_generation_does_not_go_backwards(around: Around) -> None:
    generations = around.seen_by(0)
    assert generations.latest() is None
    first, second = made(1, (Member(0, 1),)), made(2, (Member(0, 1),), step=4)
    around.store.set("generation/1", str(first))  # whose proposer died before it said so
    assert generations.latest() == first
    generations.propose(second)
    around.store.set("latest", "1")  # said late, by one that was stopped
    assert generations.latest() == second


def test_a_yes_that_comes_late_finds_the_no(around: Around) -> None:
    """A replica is the last to vote, and cut off before it has said yes; the others go on without it, and far."""
    cut, lives = (around.seen_by(replica) for replica in range(2))
    members = (cut.own, lives.own)
    for each in (cut, lives):
        each.follow(made(1, members))
    reaches, mended = threading.Event(), threading.Event()
    rule = cut._rule

    def late(key: str, word: str) -> str:
        reaches.set()
        assert mended.wait(10)
        return rule(key, word)

    with ThreadPoolExecutor(2) as pool, patch.object(cut, "_rule", late):
        without = pool.submit(lives.vote, "1/0")
        while not around.store.check(["votes/1/0"]):
            time.sleep(0.01)
        yes = pool.submit(cut.vote, "1/0")
        assert reaches.wait(10)
        lives.pulse.gone[cut.own] = "its link is cut"
        assert without.result(10).startswith(NO)
        lives.follow(made(2, (lives.own,)))
        assert [lives.vote(ballot) for ballot in ("made/2", "2/0", "2/1")] == [YES] * 3
        mended.set()
        assert yes.result(10).startswith(NO)
    assert not around.store.check(["ruling/2/0"]), "what was ruled yes is removed"


@pytest.mark.parametrize("own_step", [0, 7])
def test_who_lost_its_only_source_goes_on_with_the_state_of_that_step_alone(around: Around, own_step: int) -> None:
    source, joiner = Member(0, 1), Member(1, 1)
    generations = around.seen_by(1)
    generations.pulse.step = own_step
    generations.pulse.follow(beat_key(joiner, 0), "")
    generations.now = made(3, (source, joiner), step=7)
    generations.pulse.gone[source] = "killed"
    proposals = Proposals(generations, 1, 2)
    if own_step == 0:
        with pytest.raises(PeerError, match="no replica with the state of step 7 is left"):
            proposals.next(0, "it is gone", False, (joiner,))
        return
    proposals.next(0, "it is gone", False, (joiner,))
    assert generations.latest() == Generation(4, (joiner,), (), joiner, 7, 0, "replica 0: killed")


def test_who_has_rehearsed_founds_nothing_until_it_has_taken_a_state(around: Around) -> None:
    """A replica starts again from the checkpoint of the very step that the others hold at, rehearses, and is let in;
    the only one that has the state dies before it has sent it.
    """
    source = Member(0, 1)
    generations = around.seen_by(0)
    generations.pulse.follow(beat_key(source, 0), "")
    generations.propose(Generation(1, (source,), (), source, 3, 0, "for a test"))
    model = net()
    run = around.replica(1, model, step=3)
    loaded = [p.clone() for p in model.parameters()]
    generator = run.steps(9)
    assert next(generator) == 3
    model(torch.randn(6, 4)).square().mean().backward()
    run._optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(loaded, model.parameters(), strict=True))

    def dies(made: Generation) -> str:
        assert made.joining == (joiner,)
        run._generations.follow(made)
        run._pulse.gone[source] = "killed"
        return "replica 0 does not answer"

    joiner = Member(1, 1)
    with ThreadPoolExecutor(1) as pool, patch.object(run, "_connect", dies):
        ended = pool.submit(next, generator)
        until = time.monotonic() + 5
        while not generations.waiting(0)[0] and time.monotonic() < until:
            time.sleep(0.01)
        generations.propose(Generation(2, (source, joiner), (joiner,), source, 3, 1, "others join"))
        with pytest.raises(PeerError, match="no replica with the state of step 3 is left"):
            ended.result(10)


def test_a_job_begins_with_the_state_that_is_the_furthest(around: Around) -> None:
    every = [around.seen_by(replica) for replica in range(3)]
    for generations, step in zip(every, (3, 5, 5), strict=True):
        generations.pulse.step = step
        generations.register(generations.own)
    Proposals(every[0], 3, 3).first(0.0)
    found = every[0].latest()
    assert found is not None
    assert (found.source, found.step) == (Member(1, 1), 5)
    assert found.joining == (Member(0, 1), Member(2, 1))


def test_the_ranks_of_a_replica_rehearse_together(around: Around) -> None:
    """What the first rank sees is what both do, though a generation is made between their looks."""
    told: dict[str, str] = {}
    here = threading.Barrier(2)

    class Both:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def exchange(self, name: str, word: str) -> list[str]:
            told[f"{name} {self.rank}"] = word
            here.wait(5)
            return [told[f"{name} 0"], told[f"{name} 1"]]

    first, second = around.seen_by(0, 0, 2), around.seen_by(0, 1, 2)
    ways = [Admission(one, Proposals(one, 1, 2), 0, Both(one.shard)) for one in (first, second)]  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(ways[0].under_way)
        while not told:
            time.sleep(0.01)
        first.propose(made(1, (Member(1, 1),), step=9))
        assert ways[1].under_way() is None
        assert early.result() is None
        early = pool.submit(ways[0].under_way)
        assert (ways[1].under_way(), early.result()) == (9, 9)


# --- a whole replica -------------------------------------------------------------------------------------------------


def trained(run: Elastic, model: nn.Module, until: int, after: Callable[[int], None] = lambda _: None) -> list[int]:
    """The steps that were taken."""
    found = []
    for step in run.steps(until):
        assert not run.has_taken
        generator = torch.Generator().manual_seed(100 * step + run.replica)
        model(torch.randn(6, 4, generator=generator)).square().mean().backward()
        run._optimizer.step()
        run._optimizer.zero_grad()
        if run.has_taken:
            found.append(step)
        after(step)
    return found


@pytest.mark.parametrize("broadcast", [True, False])
def test_buffers_are_those_of_the_first_replica(around: Around, broadcast: bool) -> None:
    models = [net(), net()]
    alone = net()[1]
    runs = [around.replica(at, model, step=5, broadcast_buffers=broadcast) for at, model in enumerate(models)]
    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(trained, run, model, 9) for run, model in zip(runs, models, strict=True)]
        assert [one.result(30) for one in ended] == [[5, 6, 7, 8]] * 2
    first, second = ([*model.buffers()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) == broadcast
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert int(first[2]) == 4
    assert not torch.equal(first[0], next(iter(alone.buffers())))
    assert runs[0].sent_bytes > 0


def test_buffers_go_as_bytes() -> None:
    model = net()
    model.register_buffer("flag", torch.tensor([True, False, True]))
    held = FlatBuffers(model)
    whole = held.piece(0, held.num_bytes)
    assert held.num_bytes == 2 * 16 + 8 + 3
    assert all(
        torch.equal(held.piece(begin, begin + 5), whole[begin : begin + 5]) for begin in range(held.num_bytes - 5)
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(6, 4))
    model.get_buffer("flag").zero_()
    held.put(whole)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.register_buffer("late", torch.zeros(3))
    with pytest.raises(UsageError, match="buffers have another size"):
        held.piece(0, held.num_bytes)


def test_a_piece_of_the_buffers_moves_no_more_than_itself() -> None:
    held = FlatBuffers(net())
    moved: list[int] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.nbytes)
        return tensor

    with patch.object(torch.Tensor, "cpu", cpu):
        assert held.piece(12, 20).numel() == 8
    assert moved == [4, 4]


def test_replicas_broadcast_the_same_buffers(around: Around) -> None:
    around.replica(0, net())
    around.replica(1, net())
    with pytest.raises(UsageError, match=r"broadcast_buffers=.* \(0 bytes\)"):
        around.replica(2, net(), broadcast_buffers=False)


def test_the_training_goes_on_behind_a_first_end(around: Around) -> None:
    models = [net(), net()]
    first = around.replica(0, models[0])
    first._proposals.most = 1
    assert trained(first, models[0], 2) == [0, 1]
    assert around.store.check([FINISHED])
    second = around.replica(1, models[1])
    with ThreadPoolExecutor(2) as pool:
        joined = pool.submit(trained, second, models[1], 60)
        time.sleep(1.0)  # it waits: the first is at its end, and lives
        assert not joined.done()
        steps: list[int] = []
        ended = pool.submit(lambda: steps.extend(trained(first, models[0], 60, lambda _: time.sleep(0.01))))
        ended.result(60)
        theirs = joined.result(60)
    assert steps == [*range(2, 60)]
    assert theirs == steps[theirs[0] - 2 :]
    assert second._pulse.has_state, "it has taken that of the first"
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_who_comes_after_the_end_is_told_so(around: Around) -> None:
    first = around.replica(0, net())
    first._proposals.most = 1
    trained(first, first._twins.model, 1)
    first._pulse.stop()
    second = around.replica(1, net())
    with pytest.raises(PeerError, match="the training ended before replica 1 could join"):
        trained(second, second._twins.model, 1)


def test_what_waits_for_others_does_so_once(around: Around) -> None:
    run = around.replica(0, net())
    run._generations.now = made(1, (Member(0, 1),))
    run._place = ElasticPlace("localhost", around.port, 0, 2, 2, GONE_S)
    seen: list[float] = []

    def hold(until: float) -> None:
        seen.append(until)
        time.sleep(0.01)
        if len(seen) == 3:
            raise PeerError("no other came")

    with patch.object(run, "_hold", hold), pytest.raises(PeerError):
        run._boundary()
    assert len(set(seen)) == 1, "one that comes and dies again begins no new wait"


def test_a_state_that_cannot_be_sent_is_refused_at_the_beginning(around: Around) -> None:
    with pytest.raises(StateDictError, match=r"sampler has a set in its state.*leave it out"):
        around.replica(0, net(), state={"sampler": Held({1, 2})})
    held = Held(0)
    run = around.replica(0, net(), state={"sampler": held})
    run._proposals.most = 1
    with pytest.raises(StateDictError, match="sampler has a torch"):
        trained(run, run._twins.model, 3, lambda _: setattr(held, "value", torch.ones(2).to_sparse()))
