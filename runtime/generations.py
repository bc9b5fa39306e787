"""Generations of an elastic job: which replicas are in it, one set after another, as its store has them.

A generation is proposed by whoever sees the need, and the first proposal is the one that counts: all read it under one
key. Votes are decided under one key too. The last rank to vote says yes, the first that cannot go on says no, and
whichever is there first rules on all: so no replica takes a step that another does not. What it costs a rank does not
depend on how many there are, but where a replica is lost: then one rank of each replica reads the beats of all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass

from zgraph.bridge.private_runtime import Store
from zgraph.errors import PeerError, UsageError
from zgraph.runtime.between import LATE
from zgraph.runtime.pulse import MOST_WORDS, Line, Member, Place, Pulse, beat_key, say_gone
from zgraph.runtime.questions import claim, is_there, listed, read_all

YES, JOIN, NO = "yes", "join", "no "
"""Rulings: go on; go on, and let others in before the next step; and do not go on, with the reason behind it."""

JOINERS = "joiners"
ASK_S = 0.2
MOST_BYTES = 1 << 20
"""Of a generation's text."""


@dataclass(frozen=True)
class Generation:
    """The replicas that train together, from one change to the next.

    Args:
        number: from 1 on.
        members: in order of their numbers.
        joining: those of them that get their state from the source.
        source: whose state it is.
        step: that comes next.
        heard: how many had asked to join when it was made.
        why: it was made.
    """

    number: int
    members: tuple[Member, ...]
    joining: tuple[Member, ...]
    source: Member
    step: int
    heard: int
    why: str

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(word: bytes) -> Generation:
        """The generation that was printed.

        Raises:
            ValueError: it is none.
        """
        try:
            found = json.loads(word[:MOST_BYTES])
        except RecursionError:
            raise ValueError("a generation is nested too deep") from None
        if not isinstance(found, dict) or found.keys() != set(Generation.__dataclass_fields__):
            raise ValueError("a generation is a mapping with members")
        lists = [found[key] for key in ("members", "joining")]
        if not all(isinstance(one, list) for one in lists) or not isinstance(found["why"], str):
            raise ValueError("a generation has members")
        numbers = [found[key] for key in ("number", "step", "heard")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a generation has a number, and a step")
        members, joining = (tuple(Member.parse(one) for one in each) for each in lists)
        source = Member.parse(found["source"])
        if list(members) != sorted(set(members)) or not {source, *joining} <= {*members} or source in joining:
            raise ValueError("a generation's source and joiners are among its members")
        return Generation(numbers[0], members, joining, source, numbers[1], numbers[2], found["why"])


class Generations:
    """Generations as one rank sees them.

    Args:
        line, pulse: of this rank.
        shard, num_shards: of this rank within its replica.
        limit_s: how long to wait for others.
    """

    def __init__(self, line: Line, pulse: Pulse, shard: int, num_shards: int, limit_s: float) -> None:
        self.line, self.pulse = line, pulse
        self.shard, self.num_shards, self.limit_s = shard, num_shards, limit_s
        self.own = Member(0, 0)
        self.now: Generation | None = None
        self._last_ballot = ""

    @property
    def index(self) -> int:
        """Place of this replica among the members."""
        assert self.now is not None
        return self.now.members.index(self.own)

    # --- coming in ---------------------------------------------------------------------------------------------------

    def register(self, own: Member) -> None:
        """Ask to join, once all ranks of this replica have; this is another life of it."""
        self.own, self.now, self._last_ballot = own, None, ""
        self.pulse.follow(beat_key(own, self.shard), self._mate())
        if self.line.ask(lambda store: store.add(f"ready/{own}", 1)) == self.num_shards:
            made = self.latest()
            heard = made.heard if made is not None else 0
            place = self.line.ask(lambda store: claim(store, JOINERS, heard, json.dumps(list(own))))
            self.line.ask(lambda store: store.set(f"place/{own}", str(place)))

    def _mate(self) -> str:
        """Where the next rank of this replica beats; empty if there is no other."""
        mate = (self.shard + 1) % self.num_shards
        return beat_key(self.own, mate) if mate != self.shard else ""

    def latest(self) -> Generation | None:
        """The last generation that was made; None if none was. Raises PeerError if its text is none."""

        return _parsed(found) if (found := self.line.ask(latest_word)) else None

    def waiting(self, heard: int) -> tuple[list[Member], int]:
        """Members that have asked to join since `heard` had, and how many have by now."""
        found: list[Member] = []
        words = self.line.ask(lambda store: listed(store, JOINERS, heard, MOST_WORDS))
        for word in words:
            try:
                found.append(Member.parse(json.loads(word[:4096])))
            except (ValueError, RecursionError):
                continue
        return found, heard + len(words)

    # --- making one --------------------------------------------------------------------------------------------------

    def follow(self, generation: Generation) -> None:
        """Be in this generation: listen to the twin in the next replica, or to a mate where there is no other."""
        self.now = generation
        members = generation.members
        twin = members[(members.index(self.own) + 1) % len(members)]
        other = beat_key(twin, self.shard) if twin != self.own else self._mate()
        self.pulse.follow(beat_key(self.own, self.shard), other)

    def propose(self, made: Generation) -> None:
        """Propose a generation; another's proposal may be there already."""
        key, text = f"generation/{made.number}", str(made)
        is_ours = self.line.ask(lambda store: bytes(store.compare_set(key, "", text))).decode() == text
        if is_ours:
            self.line.ask(lambda store: store.set("latest", str(made.number)))

    def next(self, number: int, what: str) -> Generation:
        """The generation of this number, once it is proposed.

        Raises:
            PeerError: nobody proposes it within the limit.
        """
        until = time.monotonic() + self.limit_s
        key = f"generation/{number}"
        while not self.line.ask(lambda store: is_there(store, key)):
            if time.monotonic() > until:
                raise PeerError(f"no replica said within {self.limit_s:g} s who goes on, after {what}")
            time.sleep(ASK_S)
        return _parsed(self.line.ask(lambda store: bytes(store.get(key))))

    def steps_of(self, members: Sequence[Member]) -> dict[Member, int]:
        """The step that comes next by the state of each member, as its rank with this one's shard has it. Members that
        have rehearsed a step, and not taken a twin's state since, have that of none, and are left out.
        """
        keys = [beat_key(member, self.shard) for member in members]
        words = self.line.ask(lambda store: read_all(store, keys))
        places = [Place.parse(word) for word in words]
        found = zip(members, places, strict=True)
        return {member: place.step for member, place in found if place is not None and place.has_state}

    def judge(self, members: Sequence[Member], late_step: int = -1) -> dict[Member, str]:
        """Members that have ended, and why. Waits for a beat of each of their ranks, three beats at most.

        Args:
            members: to be judged, this rank's own among them: others of its ranks may have ended.
            late_step: the step that all should wait in by now: who lives and does not is late. -1 judges nobody so.
        """
        until = time.monotonic() + 3 * self.pulse.beat_s
        first: dict[str, bytes] = {}
        own = beat_key(self.own, self.shard)
        while True:
            found = {member: self.pulse.gone[member] for member in members if member in self.pulse.gone}
            keys = [beat_key(m, shard) for m in members if m not in found for shard in range(self.num_shards)]
            keys = [key for key in keys if key != own]
            words = dict(zip(keys, self.line.ask(lambda store, keys=keys: read_all(store, keys)), strict=True))  # type: ignore[misc]
            first = {**words, **first}
            silent = [key for key, word in words.items() if word == first[key]]
            if not silent or time.monotonic() > until:
                break
            time.sleep(min(self.pulse.beat_s / 2, ASK_S))
        for key in silent:
            member, shard = _of_key(key, members)
            found.setdefault(member, f"rank {shard} of it is not heard any more")
        for key, word in words.items() if late_step >= 0 else ():
            place = Place.parse(word)
            if place is None or place.step < late_step or not place.waits:
                member, shard = _of_key(key, members)
                where = f"is at step {place.step}" if place is not None else "says nothing"
                found.setdefault(member, f"rank {shard} of it {where}, and did not come within {self.limit_s:g} s")
        return found

    # --- votes -------------------------------------------------------------------------------------------------------

    def vote(self, ballot: str, problem: str = "") -> str:
        """Vote, and return the ruling: `YES`, `JOIN`, or the reason why not behind `NO`.

        The last to vote removes the ballot before, which all that vote now have read, unless it was ruled no: whoever
        was cut off then may have a yes on its way, which must come too late for ever.

        Args:
            ballot: named the same on all ranks of this generation, once.
            problem: why this rank cannot go on; empty if it can.

        Raises:
            PeerError: the store is gone.
        """
        before, self._last_ballot = self._last_ballot, ""
        ruling = self._ruled(ballot, problem, before)
        if not ruling.startswith(NO):
            self._last_ballot = ballot
        return ruling

    def _ruled(self, ballot: str, problem: str, before: str) -> str:
        assert self.now is not None
        now, key = self.now, f"ruling/{ballot}"
        if problem:
            return self._rule(key, f"{NO}{problem[:2000]}")
        if self.line.ask(lambda store: store.add(f"votes/{ballot}", 1)) == len(now.members) * self.num_shards:
            asks = self.line.ask(lambda store: is_there(store, f"{JOINERS}/{now.heard + 1}"))
            self._forget(before)
            return self._rule(key, JOIN if asks else YES)
        until = time.monotonic() + self.limit_s
        ruling = self.line.when_set(key)
        while not _is_done(ruling, ASK_S):
            problem = self.problem() or (LATE if time.monotonic() > until else "")
            if problem:
                self._rule(key, f"{NO}{problem}")
        return _text(self.line.ask(lambda store: bytes(store.get(key))))

    def _forget(self, ballot: str) -> None:
        for key in (f"votes/{ballot}", f"ruling/{ballot}") if ballot else ():
            self.line.ask(lambda store, key=key: store.delete_key(key))  # type: ignore[misc]

    def ruling(self, ballot: str) -> str:
        """The ruling, if there is one; does not wait for it."""
        key = f"ruling/{ballot}"
        return _text(self.line.ask(lambda store: bytes(store.get(key)) if is_there(store, key) else b""))

    def _rule(self, key: str, word: str) -> str:
        return _text(self.line.ask(lambda store: bytes(store.compare_set(key, "", word))))

    def problem(self) -> str:
        """Why the members cannot go on together, as far as this rank knows; empty while they can.

        Raises:
            PeerError: the store is gone.
        """
        if self.pulse.lost:
            raise PeerError(self.pulse.lost)
        assert self.now is not None
        for member in self.now.members:
            if member in self.pulse.gone:
                return f"replica {member.replica} is gone: {self.pulse.gone[member]}"
        if self.pulse.silent:
            member, shard = _of_key(self.pulse.silent, self.now.members)
            return f"replica {member.replica} is gone: rank {shard} of it was not heard for {self.pulse.gone_s:g} s"
        return ""

    def leave(self, why: str) -> None:
        """Tell the others that this life has ended."""
        own = self.own
        self.line.ask(lambda store: say_gone(store, own, why))

    def same(self, name: str, text: str) -> None:
        """Compare a text with that of the first rank that gave one under this name.

        Raises:
            UsageError: they differ; the message has the first line that does.
        """
        theirs = _text(self.line.ask(lambda store: bytes(store.compare_set(f"same/{name}", "", text))))
        if theirs == text:
            return
        pairs = [*zip(theirs.splitlines(), text.splitlines(), strict=False), ("fewer lines", "more lines")]
        first, own = next((a, b) for a, b in pairs if a != b)
        raise UsageError(
            f"replica {self.own.replica} cannot join: the replicas that train have {first[:200]!r}, and this one "
            f"{own[:200]!r}. Start it with the same model, options, optimizer and number of ranks"
        )


def latest_word(store: Store) -> bytes:
    """The text of the last generation; empty if none was made.

    What is said to be the last is where to begin: who has made one may have been stopped before it said so, or say so
    when there are later ones.
    """
    number = int(store.get("latest")) if is_there(store, "latest") else 0
    while is_there(store, f"generation/{number + 1}"):
        number += 1
    return bytes(store.get(f"generation/{number}")) if number else b""


def _is_done(future: Future[bytes], seconds: float) -> bool:
    return bool(wait([future], seconds).done)


def _of_key(key: str, members: Sequence[Member]) -> tuple[Member, int]:
    """Whose beat is under a key, and of which of its ranks."""
    _, name, shard = key.split("/")
    return next(member for member in members if str(member) == name), int(shard)


def _parsed(word: bytes) -> Generation:
    try:
        return Generation.parse(word)
    except ValueError as error:
        raise PeerError(f"the elastic job's store says {word[:80]!r} where a generation is: {error}") from None


def _text(word: bytes) -> str:
    return word.decode(errors="replace")
