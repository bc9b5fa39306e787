"""The ranks that do something together: whether the others come, or failed, ended, are gone or elsewhere.

Each learns that from its own heartbeat, which hears the next rank of the ring and the alarms of all. So a wait costs no
question to the store, and what it costs does not depend on how many ranks there are.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import NoReturn

from zgraph.bridge.private_runtime import Store
from zgraph.errors import PeerError, PlanMismatchError, ZgraphError
from zgraph.runtime.alarms import Alarm, raise_alarm
from zgraph.runtime.beats import UNREADABLE, Beat, Place, beat_key
from zgraph.runtime.departures import LINGER_SECONDS
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import Seen, elsewhere
from zgraph.runtime.heartbeat import BEAT_SECONDS, GONE_AFTER_SECONDS, Heartbeat, Watcher
from zgraph.runtime.journal import Journal, begun, keep
from zgraph.runtime.pace import parse_pace, slowest
from zgraph.runtime.questions import peek, read_all
from zgraph.runtime.store_errors import store_errors

ASK_AFTER_SECONDS = 0.5
"""How often a rank that waits looks at what its heartbeat has heard."""
READ_SECONDS = 4.0
MOST_PATIENT = 4.0
"""How many times longer who is gone is waited for where this rank's own heart is late: then others may be, too."""
NAMED = 16
"""Of how many ranks a message says one by one where they are."""
_SILENT = "no heartbeat came: the process has ended or was stopped, or its host does not answer"
AGAIN = "Look why on that rank, then start the job again from its last checkpoint."


def rank_names(ranks: Iterable[int]) -> str:
    """These ranks, for a message."""
    return ", ".join(f"rank {rank}" for rank in ranks)


class Circle:
    """Ranks that miss each other.

    Args:
        heart: of this process.
        ranks: all of them, in an order that is the same on each.
        name: the same on all of them and used for no other circle.
        limit_s: how long one waits for the others before it gives up.

    `doom` is set by whoever has found out that the ranks cannot go on; `failed_call` is the last call in which this
    rank itself raised; `patience_s` is how much longer a rank that its neighbour calls silent is listened to, in any
    wait: by default, waits for a collective go on until its connection breaks, as a process that was stopped may go on.
    """

    def __init__(self, heart: Heartbeat, ranks: tuple[int, ...], name: str, limit_s: float) -> None:
        self.heart, self.ranks, self.name, self.limit_s = heart, ranks, name, limit_s
        self.store: Store = heart.store
        self.ears = heart.ears
        self.rank, self.at = heart.rank, ranks.index(heart.rank)
        self.call = 0
        self.compared = 0
        self.failed_call = -1
        self.doom: ZgraphError | None = None
        self.patience_s: float | None = None
        self.journal: Journal | None = None
        self._suspects: dict[int, int] = {}
        self._suspected = 0.0
        self._gone: list[int] = []
        self._num_heard = 0
        self._looked: tuple[int, int] = 0, 0
        heart.add_member(self)

    # --- places ------------------------------------------------------------------------------------------------------

    def _at(self, what: str, *, waits: bool) -> None:
        self.heart.place = Place(self.call, what, waits, time.monotonic())

    def _tell(self, wait: Wait | None) -> None:
        self.heart.wait = wait

    def let_watch(self, watcher: Watcher) -> None:
        """Have someone look at each beat of the heart whether these ranks can go on."""
        self.heart.add(watcher)

    @property
    def place(self) -> Place:
        """Where the main thread of this rank is."""
        return self.heart.place

    def keep_journal(self, journal: Journal) -> None:
        """Take this journal for that of the lane that is waited for."""
        self.journal = journal
        keep(journal)

    def begin_call(self) -> None:
        """A new call of the model begins: what was said of earlier ones is past.

        Raises:
            PeerError: a peer failed in the call before, and this rank did not: they have no call in common any more.
        """
        self.raise_doom()
        if self.failed_call != self.call:
            self._raise_failed(self._read(self._key("failed")))
        self.call += 1
        self.heart.pace.begin_call()
        self.compared = 0
        if self.journal is not None:
            self.journal.call = self.call
        self._at("", waits=False)

    # --- long waits --------------------------------------------------------------------------------------------------

    def new_wait(self, place: str, number: int = 0, comparison: str = "") -> Wait:
        """A wait of this rank that has become long: at `place`, for a collective of its journal, or a comparison."""
        return Wait(self.store, self.rank, place, self.journal, number, comparison, f"{self.name}/{self.call}")

    def look(self, wait: Wait, what: str, seen: Seen) -> None:
        """Look whether the others will come to where this rank waits.

        Args:
            wait: of this rank.
            what: it waits for, without the call.
            seen: ranks found to wait outside of the model, for the next look.

        Raises:
            PeerError: a rank failed, ended, or is gone.
            PlanMismatchError: the ranks have drifted apart.
        """
        self.raise_failure()
        wait.looks += 1
        with store_errors():
            wait.tell()
        if left := self._left(wait):
            self._end(PeerError(f"{left}. {AGAIN}"))
        with store_errors():
            if found := self.drifted(wait, seen):
                self.raise_drift(self.say_drift(found))
        self.look_for_silent(what, is_default=bool(wait.comparison))

    def look_for_silent(self, what: str, *, is_default: bool = False) -> None:
        """Look whether the heartbeat of a rank has stopped, if `patience_s` says for how long.

        Args:
            what: this rank waits for.
            is_default: look also where nothing is said, with the patience of one beat. Where a rank is gone, the
                connection of a collective breaks: no need to.

        Raises:
            PeerError: one has.
        """
        if (is_default or self.patience_s is not None) and (gone := self.silent(self.patience_s)):
            self.blame(what, TimeoutError("no answer"), gone)

    def drifted(self, wait: Wait, seen: Seen) -> str:
        """Describes how the next rank's work does not match this one's; empty if it does, as far as it is known."""
        rank = self.heart.neighbour(self)
        beat = self.heart.beat_of(rank) if rank is not None else None
        if rank is None or beat is None:
            return ""
        return wait.drifted(rank, beat) or self.elsewhere(wait, rank, beat, seen)

    def elsewhere(self, wait: Wait, rank: int, beat: Beat, seen: Seen) -> str:
        """Which ranks wait outside of the model, if no rank can go on.

        All heartbeats are read only by ranks whose neighbour `rank` waits outside, with a heartbeat `beat` that is new,
        and more rarely as time goes by.
        """
        first, looked = self._looked
        if not beat.outside:
            self._looked = 0, 0
            return ""
        first = first or beat.count
        if beat.count == looked or (beat.count - first > 8 and beat.count - first < 2 * (looked - first)):
            return ""
        self._looked = first, beat.count
        beats = {r: b for r, b in self._beats().items() if r != self.rank}
        return elsewhere(self.rank, wait.place, beats, seen)

    def _beats(self) -> dict[int, Beat | None]:
        """The last heartbeat of every rank: one question, but a long answer. For ranks that are about to end."""
        with store_errors():
            words = read_all(self.store, [beat_key(rank) for rank in self.ranks])
        return {rank: Beat.read(word) for rank, word in zip(self.ranks, words, strict=True)}

    def slowest(self) -> str:
        """Which rank is slow and where, if one is: one question, with a long answer. For one rank, now and then.

        It only tells: training goes on where a word cannot be read.
        """
        beats = self._beats()
        if any(beat is not None and beat.place == UNREADABLE for beat in beats.values()):
            return f"of a rank, {UNREADABLE}"
        paces = {r: pace for r, beat in beats.items() if beat is not None and (pace := parse_pace(beat.pace))}
        return slowest(paces) if len(paces) == len(beats) else ""

    def _left(self, wait: Wait) -> str:
        """Which rank has ended and cannot come any more, and how; nothing if none has."""
        for rank, alarm in self.departed().items():
            if wait.comparison or (self.journal and alarm.begun.get(self.journal.name, 0) < wait.number):
                return f"rank {rank} {alarm.text}, while rank {self.rank} waits for {wait.place}"
        return ""

    def departed(self) -> dict[int, Alarm]:
        """The others of these ranks that have ended, and their last word."""
        return {r: alarm for r, alarm in self.heart.departed().items() if r in self.ranks and r != self.rank}

    def silent(self, patience_s: float | None = None) -> list[int]:
        """Ranks whose heartbeat has stopped: their neighbours said so, and later nothing new was heard.

        Args:
            patience_s: how much later to listen; by default a beat.
        """
        alarms = self.heart.alarms
        while self._num_heard < len(alarms):
            alarm = alarms[self._num_heard]
            self._num_heard += 1
            if alarm.kind == "silent":
                new = {r: count for r, count in alarm.lasts.items() if r in self.ranks and r != self.rank}
                if new and not self._suspects:
                    self._suspected = time.monotonic()
                self._suspects |= new
        patience_s = BEAT_SECONDS if patience_s is None else patience_s
        if self._suspects and time.monotonic() - self._suspected >= patience_s * self.heart.slowness:
            with store_errors():
                words = read_all(self.store, [beat_key(rank) for rank in self._suspects])
            beats = zip(self._suspects.items(), map(Beat.read, words), strict=True)
            self._gone = sorted(r for (r, last), beat in beats if beat is not None and beat.count == last)
            self._suspects = {}
        return self._gone

    # --- giving up ---------------------------------------------------------------------------------------------------

    def blame(self, what: str, error: Exception, gone: list[int] | None = None) -> NoReturn:
        """Tell the others who is gone, or what failed, and raise PeerError.

        Args:
            what: this rank has waited for.
            error: that ended the wait.
            gone: ranks; by default they are waited for, which takes seconds.
        """
        with store_errors():
            self.heart.read_alarms()
        since, patience_s = time.monotonic(), GONE_AFTER_SECONDS + 4 * BEAT_SECONDS
        while True:
            self.raise_failure()
            left = self.departed()
            if left or (gone := self.silent() if gone is None else gone):
                break
            if time.monotonic() - since > patience_s * min(self.heart.slowness, MOST_PATIENT):
                break
            gone = None
            time.sleep(ASK_AFTER_SECONDS / 4)
        if left:
            ends = "; ".join(f"rank {rank} {alarm.text}" for rank, alarm in left.items())
            blame = PeerError(f"{ends}, while rank {self.rank} waits for {what}. {AGAIN}")
        elif gone:
            blame = PeerError(
                f"{rank_names(gone)} of {_listed(self.ranks)} "
                f"{'is' if len(gone) == 1 else 'are'} gone: rank {self.rank} waited for {what} and "
                f"{_SILENT if isinstance(error, TimeoutError) else 'the connection broke'}. Start the job again from "
                "its last checkpoint."
            )
        else:
            blame = PeerError(f"rank {self.rank} waited for {what} and the communication failed: {error}")
        self._end(blame)

    def give_up(self, seconds: float) -> NoReturn:
        """Tell the others where every rank is, and raise. The first to give up does; the others listen to it."""
        with store_errors():
            is_first = self.store.add(self._key("given up"), 1) == 1
        until = time.monotonic() + (BEAT_SECONDS if is_first else READ_SECONDS)  # all have told where they are by then
        while time.monotonic() < until:
            self.raise_failure()
            time.sleep(ASK_AFTER_SECONDS / 4)
        self._end(PeerError(f"rank {self.rank} has waited for {seconds:g} s: {self.places(self.silent())}"))

    def places(self, gone: Collection[int] = ()) -> str:
        """Where every rank is, and what to do about it. Of many ranks, those that do not wait are named."""
        beats = self._beats() | {self.rank: Beat(0, str(self.place), self.place.waits)}
        named = self.ranks
        if len(self.ranks) > NAMED:
            free = [r for r in self.ranks if (beat := beats[r]) is None or not beat.waits or r in gone]
            named = tuple(free[:NAMED]) or self.ranks[:NAMED]
        places = []
        for rank in named:
            beat = beats[rank]
            place = beat.place if beat is not None else "has never been seen"
            places.append(f"rank {rank} {place}{' (its process or its host is gone)' if rank in gone else ''}")
        if num_others := len(self.ranks) - len(named):
            num_waiting = sum(beat is not None and beat.waits for r, beat in beats.items() if r not in named)
            places.append(f"of {num_others} others {num_waiting} wait")
        return (
            f"{'; '.join(places)}. Look what keeps those that do not wait; if they only need more time, set "
            "ZGRAPH_TIMEOUT to more seconds."
        )

    def _end(self, blame: PeerError) -> NoReturn:
        """Tell the others, and raise."""
        self.fail(blame)
        if self.rank == self.ranks[0]:
            time.sleep(LINGER_SECONDS)  # the store may end with this process: let the others read first
        raise blame from None

    # --- failures ----------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the peers that this rank cannot go on with the present call. Nothing happens if one told so before."""
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        text = f"{type(error).__name__} on rank {self.rank}: {said}"[:4000]
        try:
            if self.store.compare_set(self._key("failed"), "", text).decode(errors="replace") == text:
                raise_alarm(self.store, Alarm("failed", f"{self.name}/{self.call}", self.rank, text, begun()))
        except RuntimeError:
            return  # the store is gone: the peers are told by the broken connections

    def raise_failure(self) -> None:
        """Raise PeerError if the heartbeat has heard that a peer cannot go on with the present call."""
        self.raise_doom()
        for alarm in list(self.heart.alarms):
            name, call = alarm.failed_call
            if alarm.kind == "failed" and name == self.name and self.failed_call < call <= self.call:
                self._raise_failed(alarm.text)
            if alarm.kind == "over" and alarm.scope == self.group_name:
                self.raise_drift(alarm.text.partition(": ")[2])

    def _raise_failed(self, text: str) -> None:
        if text and not text.split(":")[0].endswith(f"on rank {self.rank}"):
            kind = PlanMismatchError if text.startswith(PlanMismatchError.__name__) else PeerError
            raise kind(f"another rank failed: {text}")

    def raise_doom(self) -> None:
        """Raise what the heartbeat has found, if the ranks cannot go on."""
        if self.doom is not None:
            raise type(self.doom)(str(self.doom))

    def await_doom(self, seconds: float) -> None:
        """Raise what the heartbeat finds within so many seconds, if it finds that the ranks cannot go on."""
        until = time.monotonic() + seconds
        while self.doom is None and time.monotonic() < until:
            time.sleep(ASK_AFTER_SECONDS / 10)
        self.raise_doom()

    def say_drift(self, found: str) -> str:
        """Tell all ranks that they have drifted apart, as no other has before; what the first to tell has said.

        Raises RuntimeError if the store is gone.
        """
        first = self.store.compare_set(self._drift_key, "", found).decode(errors="replace")
        if first == found:
            word = f"{PlanMismatchError.__name__}: {found}"
            raise_alarm(self.store, Alarm("over", self.group_name, self.rank, word))
        return first

    def raise_drift(self, text: str | None = None) -> None:
        """Raise PlanMismatchError if the ranks have drifted apart: from then on they have no call in common.

        Args:
            text: how, if it is known; by default the store is asked.
        """
        text = self._read(self._drift_key) if text is None else text
        if text:
            self._have_read("drift")
            raise PlanMismatchError(text)

    def _have_read(self, word: str) -> None:
        """Tell the others that this rank knows; the first, with which the store may end, waits for them, not long."""
        key = f"{self.name}/read/{word}"
        with store_errors():
            count = self.store.add(key, 1)
            until = time.monotonic() + READ_SECONDS * (self.rank == self.ranks[0])
            while time.monotonic() < until and count < len(self.ranks):
                time.sleep(ASK_AFTER_SECONDS / 5)
                count = self.store.add(key, 0)

    def end_all(self, error: PeerError) -> None:
        """Have all ranks raise this: none can go on with any model of these ranks."""
        word = f"{PeerError.__name__}: {error}"
        with store_errors():
            raise_alarm(self.store, Alarm("over", self.group_name, self.rank, word))

    # --- keys --------------------------------------------------------------------------------------------------------

    @property
    def _drift_key(self) -> str:
        return f"{self.group_name}/drift"  # of all models of these ranks

    @property
    def group_name(self) -> str:
        """A name that all models of these ranks share."""
        return self.name.rpartition("/")[0]

    def _key(self, word: str) -> str:
        return f"{self.name}/{self.call}/{word}"

    def _read(self, key: str) -> str:
        """The text under a key; empty if it is not there."""
        with store_errors():
            return peek(self.store, key).decode(errors="replace")


def _listed(ranks: tuple[int, ...]) -> str:
    """The numbers of ranks, for a message."""
    return str(list(ranks)) if len(ranks) <= NAMED else f"[{ranks[0]}, ..., {ranks[-1]}]"
