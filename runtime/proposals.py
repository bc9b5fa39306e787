"""Who is in an elastic job's next generation: those that live, and those that have asked to join."""

from __future__ import annotations

from zgraph.environment import environment
from zgraph.errors import PeerError
from zgraph.runtime.between import LATE
from zgraph.runtime.generations import Generation, Generations
from zgraph.runtime.pulse import Member

FOUNDING_S = 30.0
"""How long the least number of replicas waits, at the beginning, for the others to come."""
MOST_TRIES = 2
"""Generations with the same members that may not come about, before one of these is left out."""


class Proposals:
    """Proposals of one replica, made by its first rank.

    Args:
        generations: as that rank sees them.
        least, most: replicas that the job takes.

    `num_tries` counts generations with the same members since the last step.
    """

    def __init__(self, generations: Generations, least: int, most: int) -> None:
        self.generations, self.least, self.most = generations, least, most
        self.num_tries = 0

    def first(self, waited_s: float) -> None:
        """Found the job, once all replicas are there; or the least number, and others had their time."""
        generations = self.generations
        asked, heard = generations.waiting(0)
        here = {member.replica: member for member in asked}
        has_waited = waited_s > min(FOUNDING_S, environment().timeout_s / 2)
        if len(here) < (self.least if has_waited else self.most):
            return
        gone = generations.judge([*here.values()])
        members = tuple(sorted(member for member in here.values() if member not in gone))
        if len(members) >= self.least and generations.own in members:
            steps = generations.steps_of(members)
            able = [member for member in members if member in steps]
            if not able:
                raise PeerError("no replica has a state to begin with; start all again from the last checkpoint")
            source = max(able, key=lambda member: steps[member])  # the first of those that are the furthest
            joining = tuple(member for member in members if member != source)
            generations.propose(Generation(1, members, joining, source, steps[source], heard, "the job begins"))

    def next(self, step: int, why: str, joins: bool, carried: tuple[Member, ...]) -> None:
        """Propose the generation behind this one.

        Args:
            step: that comes next.
            why: it is made.
            joins: whether those that have asked are let in.
            carried: members that have not got their state yet.

        Raises:
            PeerError: another rank of this replica is gone, or nobody is left who has the state.
        """
        generations, now = self.generations, self.generations.now
        assert now is not None
        step = max(step, now.step)  # who joins knows of none yet
        gone = generations.judge(now.members, step if why.startswith(LATE) else -1)
        if generations.own in gone:
            raise PeerError(f"replica {generations.own.replica} is gone: {gone[generations.own]}")
        members = [member for member in now.members if member not in gone]
        heard, new = now.heard, list[Member]()
        if joins:
            new, heard = self._new(heard, members)
        elif len(members) == len(now.members) and (left_out := self._unreached(members)) is not None:
            members.remove(left_out)
            gone = {left_out: f"it could not be reached ({why})"}
        joining = tuple(sorted({*new, *(member for member in carried if member in members)}))
        able = [member for member in members if member not in joining]
        if not able:  # who has just begun, or was left out, may have the state of this step all the same
            steps = generations.steps_of(joining)
            able = [member for member in joining if steps.get(member) == step][:1]
            joining = tuple(member for member in joining if member not in able)
        if not able:
            raise PeerError(f"no replica with the state of step {step} is left: {why}; load the last checkpoint")
        told = "; ".join(f"replica {member.replica}: {reason}" for member, reason in gone.items()) or why
        together = tuple(sorted([*members, *new]))
        generations.propose(Generation(now.number + 1, together, joining, able[0], step, heard, told[:2000]))

    def _new(self, heard: int, members: list[Member]) -> tuple[list[Member], int]:
        """Those that have asked and live, and how many have asked by now."""
        asked, heard = self.generations.waiting(heard)
        last = {member.replica: member for member in asked}
        gone = self.generations.judge([*last.values()])
        here = {member.replica for member in members}
        return [member for member in last.values() if member not in gone and member.replica not in here], heard

    def _unreached(self, members: list[Member]) -> Member | None:
        """Who is left out, where all live and do not come together: the last that is another; None to try again."""
        self.num_tries += 1
        others = [member for member in members if member != self.generations.own]
        return others[-1] if others and self.num_tries > MOST_TRIES else None
