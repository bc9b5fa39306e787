"""Elastic training: replicas of a model that may die, and join, while the others go on.

Each replica is a job of its own ranks, compiled over these at any stage. Ranks that hold the same shard meet across
replicas in a group that is made anew whenever one is lost or comes. Gradients are kept until all replicas have agreed
to take the step; where one is lost before, those that are left take the mean again, over themselves. A replica that
comes gets its state from a twin at a step boundary.

That the group across replicas is apart from the replicas' own, and small, is as in torchft (Meta, 2024).
"""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from zgraph.bridge import private_runtime
from zgraph.environment import ElasticPlace, elastic_place, environment
from zgraph.errors import PeerError, UsageError
from zgraph.optim.elastic_checks import check_gradients, check_parameters, digest
from zgraph.optim.gradients import FlatBuffers, FlatGradients
from zgraph.optim.twins import Stateful, Twins
from zgraph.runtime.admission import FINISHED, Admission
from zgraph.runtime.between import Between, BrokenError
from zgraph.runtime.generations import ASK_S, JOIN, NO, Generation, Generations
from zgraph.runtime.heartbeat import heartbeat
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.proposals import Proposals
from zgraph.runtime.pulse import Line, Member, Pulse
from zgraph.runtime.questions import is_there
from zgraph.runtime.shards import settle_host_memory

log = logging.getLogger("zgraph")


class Elastic:
    """One replica of an elastic job: what `zgraph.elastic` returns.

    Attributes:
        step: that comes next; the number of steps that all have taken.
        replica: number of this replica.
        is_rehearsing: whether the step under way is one that does not count, before this replica joins.
        has_taken: whether the step under way has been taken, by this replica with the others: False until the
            optimizer's step, in a rehearsal, and where this replica was left out of it and its weights are old ones.
        num_lost: replicas that were lost so far, as far as this one knows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        place: ElasticPlace,
        state: Mapping[str, Stateful],
        rng: bool,
        step: int = 0,
        broadcast_buffers: bool = True,
    ) -> None:
        self.step, self.replica, self.is_rehearsing, self.num_lost = step, place.replica, False, 0
        self.has_taken = False
        self._place, self._limit_s = place, environment().timeout_s
        has_ranks = dist.is_initialized() and dist.get_world_size() > 1
        shard, num_shards = (dist.get_rank(), dist.get_world_size()) if has_ranks else (0, 1)
        self._line = Line(place.host, place.port)
        self._pulse = Pulse(self._line, place.gone_s)
        atexit.register(self._pulse.stop)
        self._generations = Generations(self._line, self._pulse, shard, num_shards, self._limit_s)
        self._proposals = Proposals(self._generations, place.least, place.most)
        meetings = _meetings(num_shards) if has_ranks else None
        self._admission = Admission(self._generations, self._proposals, place.replica, meetings)
        self._twins = Twins(model, optimizer, state, rng)
        self._gradients = FlatGradients([p for p in model.parameters() if p.requires_grad])
        self._buffers = FlatBuffers(model if broadcast_buffers else None)
        self._between: Between | None = None
        self._is_reduced, self._lets_in, self._sent = False, False, 0
        self._is_checked = False
        self._generations.own = Member(place.replica, 0)
        self._generations.same(
            f"shard/{shard}", digest(model, optimizer, num_shards, broadcast_buffers, self._buffers.num_bytes)
        )
        self._optimizer, self._has_stepped = optimizer, False
        self._known = {id(p) for p in self._gradients.parameters}
        check_parameters(model, optimizer)
        self._twins.check()
        optimizer.register_step_pre_hook(self._before_update)
        _RUNS[optimizer] = weakref.ref(self)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def steps(self, until: int) -> Iterator[int]:
        """Numbers of the steps to take: the body of the loop takes one, and calls `optimizer.step()` once.

        A replica that joins a job under way first rehearses a step, whose number is the job's: it compiles in it, while
        nobody waits, and what it computes there is given up for a twin's state. Between two steps of the loop replicas
        come in, and where fewer than the least are left, the others wait for them.

        Args:
            until: how many steps are taken in all.

        Raises:
            PeerError: too few replicas are left, or the store is gone.
            UsageError: the body of the loop has not called `optimizer.step()`.
        """
        if self._generations.now is None and (under_way := self._admission.under_way()) is not None:
            self.is_rehearsing, self._pulse.has_state = True, False  # the optimizer steps by this replica's gradients
            yield from self._body(min(under_way, until - 1))
            self.is_rehearsing = False
        if self._generations.now is not None and self.step < until:
            self._line.ask(lambda store: store.delete_key(FINISHED))
        while self.step < until:
            self._boundary()
            if self.step < until:
                yield from self._body(self.step)
        end = str(self.step)
        self._line.ask(lambda store: store.set(FINISHED, end))

    def _before_update(self, _: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if any(map(callable, (*args, *kwargs.values()))):  # torch gives the optimizer, too, which is not
            raise UsageError(
                "optimizer.step(closure) would make gradients of this replica alone: call loss.backward() before, and "
                "optimizer.step() without a closure"
            )
        if self._has_stepped:
            raise UsageError(
                "optimizer.step() again in one step of run.steps(...): its gradients are this replica's alone; "
                "take one step in the body of the loop"
            )
        self.reduce()
        self._has_stepped = True

    def _body(self, step: int) -> Iterator[int]:
        self._is_reduced = self._has_stepped = self.has_taken = False
        self._pulse.step, self._pulse.waits = step, False
        yield step
        if not self._is_reduced:
            raise UsageError(
                f"step {step} has not called optimizer.step(): the body of `for step in run.steps(...)` is one step of "
                "the optimizer; accumulate gradients within it, and call run.reduce() where the optimizer may not step"
            )

    @property
    def num_replicas(self) -> int:
        """Replicas that train together now; 0 before this one has joined."""
        return len(self._generations.now.members) if self._generations.now is not None else 0

    @property
    def replicas(self) -> tuple[int, ...]:
        """Numbers of the replicas that train together now."""
        return tuple(m.replica for m in self._generations.now.members) if self._generations.now is not None else ()

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to other replicas so far."""
        return self._sent + (self._between.sent_bytes if self._between is not None else 0)

    # --- the step ----------------------------------------------------------------------------------------------------

    def reduce(self) -> None:
        """Bring the mean over the replicas into `.grad`, once all have agreed to take the step.

        `optimizer.step()` calls it; call it before what reads gradients, such as clipping or a gradient scaler. A
        second call in one step does nothing.

        Raises:
            PeerError: the store is gone, or nobody says who goes on.
        """
        if self._is_reduced:
            return
        self._is_reduced = True
        if self.is_rehearsing:
            return
        check_gradients(self._optimizer, self._known)
        settle_host_memory()
        self._pulse.waits = True
        while True:
            generations, between = self._generations, self._between
            if generations.now is None or between is None:
                raise UsageError("a step is taken within `for step in run.steps(...)`, where replicas have met")
            ballot = f"{generations.now.number}/{self.step}"
            mean, buffers, problem = None, None, ""
            try:
                between.problem = lambda ballot=ballot: self._problem(ballot)  # type: ignore[misc]
                mean = between.mean(self._gradients.piece, self._gradients.numel)
                buffers = between.of_first(self._buffers.piece, self._buffers.num_bytes)
            except BrokenError as error:
                problem = str(error)
            ruling = generations.vote(ballot, problem)
            if not ruling.startswith(NO) and mean is not None and buffers is not None:
                break
            if not self._regroup(ruling.removeprefix(NO)):
                self._gradients.drop()
                return
        self._gradients.put(mean)
        if between.index > 0:
            self._buffers.put(buffers)
        self.step += 1
        self.has_taken = True
        self._proposals.num_tries, self._lets_in = 0, ruling == JOIN

    def _problem(self, ballot: str) -> str:
        ruling = self._generations.ruling(ballot)
        return ruling.removeprefix(NO) if ruling.startswith(NO) else self._generations.problem()

    # --- generations -------------------------------------------------------------------------------------------------

    def _boundary(self) -> None:
        """Let others in, or come in, or wait for as many as are needed."""
        self._pulse.step, self._pulse.waits = self.step, True
        if self._generations.now is not None and not self._is_checked:
            self._twins.check()  # again, now that the optimizer has its states
            self._is_checked = True
        if self._generations.now is not None and self._lets_in and self._regroup("others join", joins=True):
            self._hand_over()
        self._lets_in = False
        until = time.monotonic() + self._limit_s
        while self._generations.now is None or self.num_replicas < self._place.least:
            if self._generations.now is None:
                self._come_in()
            else:
                self._hold(until)

    def _hold(self, until: float) -> None:
        """Wait for others to join: fewer are left than the job takes."""
        now, generations = self._generations.now, self._generations
        assert now is not None
        key = f"generation/{now.number + 1}"
        if generations.shard == 0 and generations.index == 0:
            log.warning("%s at step %d: waiting for others", self._few(), self.step)
        while not self._line.ask(lambda store: is_there(store, key)):
            if generations.shard == 0 and (generations.waiting(now.heard)[0] or generations.problem()):
                break
            if time.monotonic() > until:
                why = f"{self._few()}, and no other came within {self._limit_s:g} s"
                generations.leave(why)
                raise PeerError(f"{why}; start the job again from its last checkpoint, or with a lower MIN")
            time.sleep(ASK_S)
        if self._regroup("others join", joins=True):
            self._hand_over()

    def _few(self) -> str:
        return f"{self.num_replicas} of at least {self._place.least} replicas are left"

    def _regroup(self, why: str, *, joins: bool = False, carried: tuple[Member, ...] = ()) -> bool:
        """Be in the next generation; False if this replica is not in it.

        Args:
            why: it is made.
            joins: whether those that have asked are let in.
            carried: members of the last generation that have not yet got their state.
        """
        generations = self._generations
        while True:
            now = generations.now
            assert now is not None
            if generations.shard == 0:
                self._proposals.next(self.step, why, joins, carried)
            made = generations.next(now.number + 1, why)
            if generations.own not in made.members:
                log.warning(
                    "replica %d was left out at step %d (%s): it joins again", self.replica, self.step, made.why
                )
                generations.now = None
                return False
            self._tell(now, made)
            if not (why := self._connect(made)):
                return True
            joins, carried = False, made.joining

    def _tell(self, now: Generation, made: Generation) -> None:
        lost = [member for member in now.members if member not in made.members]
        self.num_lost += len(lost)
        if self._generations.shard or self._generations.own != made.source:
            return
        for member in lost:
            log.warning("replica %d is lost at step %d: %s", member.replica, made.step, made.why)
        if made.joining:
            log.warning("replicas %s join at step %d", [member.replica for member in made.joining], made.step)

    def _connect(self, made: Generation) -> str:
        """Meet the others of a generation; empty once all have, else why not."""
        generations, ballot = self._generations, f"made/{made.number}"
        if self._between is not None:
            self._sent += self._between.sent_bytes
            self._between.close()
        self._between, problem = None, ""
        generations.follow(made)
        name = f"group/{made.number}/{generations.shard}"
        try:
            self._between = Between(
                self._line, name, generations.index, len(made.members), lambda: self._problem(ballot), self._limit_s
            )
        except BrokenError as error:
            problem = str(error)
        ruling = generations.vote(ballot, problem)
        return ruling.removeprefix(NO) if ruling.startswith(NO) else ""

    # --- coming in ---------------------------------------------------------------------------------------------------

    def _come_in(self) -> None:
        """Ask to join, and take the state of a twin."""
        made = self._admission.come_in()
        why = self._connect(made)
        if not why or self._regroup(why, carried=made.joining):
            self._hand_over()

    def _hand_over(self) -> None:
        """Give this rank's state to those that join, or take it."""
        now, own, between = self._generations.now, self._generations.own, self._between
        assert now is not None
        assert between is not None
        if not now.joining or own not in (now.source, *now.joining):
            return
        between.problem = self._generations.problem
        try:
            if own == now.source:
                self._twins.send(between, [now.members.index(member) for member in now.joining], self.step)
            else:
                self.step = self._twins.take(between, now.members.index(now.source))
                self._pulse.step = self.step
                self._pulse.has_state = True
        except BrokenError as error:
            if own != now.source:
                raise PeerError(f"replica {self.replica} did not get its state: {error}") from None
            log.warning("the state of step %d did not reach all that join: %s", self.step, error)


_RUNS: WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Elastic]] = WeakKeyDictionary()
"""Those whose steps are taken with other replicas."""


def reduce_among_replicas(optimizer: torch.optim.Optimizer) -> bool:
    """Bring the mean over the replicas into `.grad`, where an optimizer's steps are taken with others: see
    `Elastic.reduce`. Whether the step counts: not in a rehearsal, and not where this replica was left out.
    """
    run = found() if (found := _RUNS.get(optimizer)) is not None else None
    if run is None:
        return True
    run.reduce()
    return run.has_taken


def _meetings(num_shards: int) -> Meetings:
    heart = heartbeat(private_runtime.store(), dist.get_rank())
    return Meetings(heart, tuple(range(num_shards)), "zgraph/elastic", environment().timeout_s)


def elastic(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    state: Mapping[str, Stateful] | None = None,
    rng: bool = False,
    step: int = 0,
    broadcast_buffers: bool = True,
) -> Elastic:
    """Train as one of several replicas, which may die and join while the others go on.

    Each replica is a job of its own, over whose ranks the model is compiled; `zgraph launch --elastic MIN:MAX` starts
    them, and others in place of those that die:

        model = zgraph.compile(model, stage=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        run = zgraph.elastic(model, optimizer)
        for step in run.steps(1000):
            model(**batch(step, run.replica)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    All replicas begin with the state of the first: of those that the job begins with, whose `step` is the furthest.

    Args:
        model: compiled by `zgraph.compile` over the ranks of this replica; or a plain module on one rank.
        optimizer: of its parameters.
        state: what else a replica that joins takes over: schedules and the like, with `state_dict` and
            `load_state_dict`, by name.
        rng: whether it takes over the states of torch's generators of random numbers.
        step: that comes next, where the model was loaded from a checkpoint: the number of steps that were taken.
        broadcast_buffers: whether all replicas take over the buffers of the first after each step, as in torch's DDP.
            Without it, those of BatchNorm and the like are each replica's own.

    Returns:
        The handle: `steps()`, `reduce()`, `step`, `has_taken`, `replica`, `num_replicas`.

    Raises:
        UsageError: the environment says nothing of an elastic job, or the others train another model.
        PeerError: the job's store does not answer.
    """
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            "elastic takes a module and a torch optimizer: of an engine of zgraph.initialize give engine.module and "
            "engine.optimizer"
        )
    if step < 0:
        raise UsageError(f"step is the number of steps that were taken, and not {step}")
    return Elastic(model, optimizer, elastic_place(), state or {}, rng, step, broadcast_buffers)


__all__ = ["Elastic", "elastic"]
