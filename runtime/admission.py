"""Coming into an elastic job: a new life of a replica asks to join, and waits until a generation has it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from zgraph.errors import PeerError
from zgraph.runtime.generations import ASK_S, Generation, Generations
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.proposals import Proposals
from zgraph.runtime.pulse import Member
from zgraph.runtime.questions import is_there

FINISHED = "finished"
"""Key that is there while those that train have come to the end of their steps."""


class Admission:
    """How one replica comes in.

    Args:
        generations: as this rank sees them.
        proposals: of its replica.
        replica: its number.
        meetings: of the ranks of the replica; None for one rank.
    """

    def __init__(self, generations: Generations, proposals: Proposals, replica: int, meetings: Meetings | None) -> None:
        self._generations, self._proposals, self._replica = generations, proposals, replica
        self._meetings = meetings
        self._told = itertools.count()

    def under_way(self) -> int | None:
        """The step that the job is at, as the first rank of this replica sees it; None where none has begun."""
        latest = self._generations.latest
        word = self._of_first("under way", lambda: str(made.step) if (made := latest()) else "")
        return int(word) if word else None

    def come_in(self) -> Generation:
        """Ask to join until a generation has this replica, and return it.

        Raises:
            PeerError: the training has ended, another rank of this replica is gone, or nobody lets it in.
        """
        made = None
        while made is None:
            self._generations.register(self._new_life())
            made = self._admitted()
        return made

    def _of_first(self, what: str, word: Callable[[], str]) -> str:
        """A word of this replica's first rank, on all of its ranks, which call this together."""
        found = word() if self._generations.shard == 0 else ""
        if self._meetings is not None:
            found = self._meetings.exchange(f"{what}/{next(self._told)}", found)[0]
        return found

    def _new_life(self) -> Member:
        """Another life of this replica, the same on all its ranks."""
        key, line = f"lives/{self._replica}", self._generations.line
        life = self._of_first("life", lambda: str(line.ask(lambda store: store.add(key, 1))))
        return Member(self._replica, int(life))

    def _admitted(self) -> Generation | None:
        """The generation that this life is in; None if there is one that has passed it over."""
        generations, began = self._generations, time.monotonic()
        ask, pulse, limit_s = generations.line.ask, generations.pulse, generations.limit_s
        place = f"place/{generations.own}"
        while True:
            made = generations.latest()
            if made is None:
                self._proposals.first(time.monotonic() - began)
            elif generations.own in made.members:
                return made
            elif made.heard >= (ask(lambda s: int(s.get(place)) if is_there(s, place) else 0) or made.heard + 1):
                return None
            if pulse.lost or pulse.silent:
                raise PeerError(pulse.lost or f"a rank of this replica is gone ({pulse.silent})")
            if made is not None and ask(lambda store: is_there(store, FINISHED)):
                if len(generations.judge(made.members)) == len(made.members):
                    raise PeerError(f"the training ended before replica {self._replica} could join")
                began = time.monotonic()  # they live, and may go on
            if time.monotonic() - began > limit_s:
                raise PeerError(f"replica {self._replica} was not let in within {limit_s:g} s")
            time.sleep(ASK_S)
