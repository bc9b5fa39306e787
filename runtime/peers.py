"""Messages between ranks beside their data: that they live, that they failed, and what they compiled.

All of it goes through the job's key-value store, so that no comparison can ever be mistaken for a gather.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.environment import environment
from zgraph.errors import PeerError, PlanMismatchError, ZgraphError
from zgraph.runtime.alarms import Alarm, raise_alarm
from zgraph.runtime.departures import LINGER_SECONDS, departures
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import elsewhere
from zgraph.runtime.gloo_transport import Transfer
from zgraph.runtime.heartbeat import BEAT_SECONDS, Place, Watcher, beat_key, heartbeat
from zgraph.runtime.journal import Journal, begun, keep
from zgraph.runtime.store_errors import store_errors

GONE_AFTER_SECONDS = 5.0
ASK_AFTER_SECONDS = 0.5
READ_SECONDS = 4.0
AGAIN = "Look why on that rank, then start the job again from its last checkpoint."
_FIRST_NAP, _LONGEST_NAP = 2e-5, 1e-3


def rank_names(ranks: Iterable[int]) -> str:
    """These ranks, for a message."""
    return ", ".join(f"rank {rank}" for rank in ranks)


_serials: Counter[tuple[int, ...]] = Counter()


def unique_name(group: dist.ProcessGroup | None) -> str:
    """A name that all ranks of the group give what they make next: its members make the same things in one order."""
    ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
    _serials[ranks] += 1
    return f"zgraph/{'_'.join(map(str, ranks))}/{_serials[ranks]}"


class Peers:
    """The ranks that train one model together.

    Args:
        group: their process group.
        name: a name for the model that is the same on all of them and used for no other.
        device: where the data is that they exchange. On the CPU a wait polls; a GPU's stream waits by itself.

    `waited_s` counts the seconds that this process has stood still in waits: on the CPU, communication not hidden.
    `doom` is set by whoever has found out that the ranks cannot go on; `failed_call` is the last call in which this
    rank itself raised.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, device: torch.device) -> None:
        self.group, self.name = group, name
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank()
        self.store = private_runtime.store()
        self.polls = _is_host(device)
        self.waited_s = 0.0
        self.call = 0
        self.compared = 0
        self.failed_call = -1
        self.doom: ZgraphError | None = None
        self.journal: Journal | None = None
        self.limit_s = environment().timeout_s
        self._heartbeat = heartbeat(self.store, self.rank)

    # --- waiting -----------------------------------------------------------------------------------------------

    def wait(self, work: dist.Work | Transfer, what: str) -> None:
        """Wait for a collective, unless a peer fails meanwhile.

        Raises:
            PeerError: a peer failed or is gone, or does not come within ZGRAPH_TIMEOUT; the message says which.
        """
        if self.doom is not None:
            self.raise_doom()
        began = time.perf_counter()
        self._at(what, waits=True)
        if self.polls:
            self._poll(work, what)
        try:
            work.wait()
        except RuntimeError as error:
            self.blame(what, error)
        self._at(what, waits=False)
        self.waited_s += time.perf_counter() - began

    def _at(self, what: str, *, waits: bool) -> None:
        self._heartbeat.place = Place(self.call, what, waits, time.monotonic())

    def let_watch(self, watcher: Watcher) -> None:
        """Have someone look at each beat of the heart whether these ranks can go on."""
        self._heartbeat.add(watcher)

    @property
    def place(self) -> Place:
        """Where the main thread of this rank is."""
        return self._heartbeat.place

    def _poll(self, work: dist.Work | Transfer, what: str) -> None:
        nap, asked, told = _FIRST_NAP, time.monotonic(), ""
        place, number = f"{what} in call {self.call}", work.number if isinstance(work, Transfer) else 0
        long = Wait(self.store, self.rank, self.ranks, place, self.journal, number)
        until = asked + self.limit_s
        while not work.is_completed():
            if isinstance(work, Transfer):
                work.over.wait(ASK_AFTER_SECONDS)
            else:
                time.sleep(nap)
                nap = min(nap * 1.5, _LONGEST_NAP)
            if time.monotonic() - asked > ASK_AFTER_SECONDS:
                asked = time.monotonic()
                self.raise_failure()
                if number:
                    self._look(long)
                if asked > until:
                    self._give_up(self.limit_s)
                told = self.say_waiting(f"{number} rank {self.rank} waits for {what}")
        if told:
            self.take_back(told)

    def say_waiting(self, word: str) -> str:
        """Say what this rank waits for, unless another says so already; the word."""
        with store_errors():
            self.store.compare_set(self._key("waiting"), "", word)
        return word

    def take_back(self, word: str) -> None:
        """Say no more what this rank has waited for."""
        with store_errors():
            self.store.compare_set(self._key("waiting"), word, "")

    def _stuck(self) -> str:
        """A rank that waits, and for what, in a collective that this rank has not begun; empty if there is none."""
        number, _, waiting = self._read(self._key("waiting")).decode().partition(" ")
        known = begun().get(self.journal.name, 0) if self.journal is not None else 0
        return "" if waiting and 0 < int(number) <= known else waiting

    def _look(self, wait: Wait) -> None:
        """Tell for what this rank waits, and raise if another will not come there."""
        with store_errors():
            wait.tell()
            left, found = wait.left(), wait.drifted() or self.elsewhere(wait)
        if found:
            with store_errors():
                self.store.compare_set(self._drift_key, "", found)
            self.raise_drift()
        if left:
            self._end(PeerError(f"{left}. {AGAIN}"))

    def elsewhere(self, wait: Wait) -> str:
        """Which ranks wait outside of the model, if no rank can go on."""
        waiting = [r for r, beat in self._beats().items() if b" waits for " in beat]
        return elsewhere(self.store, self.rank, self.ranks, wait.place, [self.rank, *waiting], wait.outside)

    def blame(self, what: str, error: Exception, gone: list[int] | None = None) -> NoReturn:
        """Tell the others who is gone, or what failed, and raise PeerError.

        Args:
            what: this rank has waited for.
            error: that ended the wait.
            gone: ranks; by default they are looked for, which takes seconds.
        """
        self.raise_failure()
        with store_errors():
            left = departures(self.store, [r for r in self.ranks if r != self.rank])
        if left:
            ends = "; ".join(f"rank {rank} {how}" for rank, how, _ in left)
            blame = PeerError(f"{ends}, while rank {self.rank} waits for {what}. {AGAIN}")
        elif gone := self.gone() if gone is None else gone:
            blame = PeerError(
                f"{rank_names(gone)} of {list(self.ranks)} "
                f"{'is' if len(gone) == 1 else 'are'} gone: rank {self.rank} waited for "
                f"{what} and the connection broke. Start the job again from its last checkpoint."
            )
        else:
            blame = PeerError(f"rank {self.rank} waited for {what} and the communication failed: {error}")
        self._end(blame)

    def _give_up(self, seconds: float) -> NoReturn:
        """Tell the others where every rank is, and raise."""
        gone = self.gone()
        self._end(PeerError(f"rank {self.rank} has waited for {seconds:g} s: {self.places(gone)}"))

    def places(self, gone: Collection[int] = ()) -> str:
        """Where every rank is, and what to do about it."""
        beats = self._beats() | {self.rank: f"0 {self._heartbeat.place}".encode()}
        places = []
        for rank in self.ranks:
            place = beats[rank].decode().partition(" ")[2] or "has never been seen"
            places.append(f"rank {rank} {place}{' (its process or its host is gone)' if rank in gone else ''}")
        return (
            f"{'; '.join(places)}. Look what keeps those that do not wait; if they only need more time, set "
            "ZGRAPH_TIMEOUT to more seconds."
        )

    def _end(self, blame: PeerError) -> NoReturn:
        """Tell the others, and raise."""
        self.fail(blame)
        time.sleep(LINGER_SECONDS)  # the store may end with this process: let the others read first
        raise blame from None

    def gone(self) -> list[int]:
        """Ranks whose heartbeat has stopped.

        Raises:
            PeerError: another rank has found out already.
        """
        first = self._beats()
        until = time.monotonic() + GONE_AFTER_SECONDS
        while time.monotonic() < until:
            self.raise_failure()
            time.sleep(BEAT_SECONDS / 4)
        second = self._beats()
        return [r for r in self.ranks if r != self.rank and first[r] == second[r]]

    def _beats(self) -> dict[int, bytes]:
        return {r: self.beat(r) for r in self.ranks}

    def beat(self, rank: int) -> bytes:
        """The last heartbeat of a rank; empty if there was none."""
        return self._read(beat_key(rank))

    # --- failures ----------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the peers that this rank cannot go on with the present call. Nothing happens if one told so before."""
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        text = f"{type(error).__name__} on rank {self.rank}: {said}"[:4000]
        try:
            if self.store.compare_set(self._key("failed"), "", text).decode() == text:
                raise_alarm(self.store, Alarm("failed", f"{self.name}/{self.call}", self.rank, text, begun()))
        except RuntimeError:
            return  # the store is gone: the peers are told by the broken connections

    def raise_failure(self) -> None:
        """Raise PeerError if a peer said that it cannot go on with the present call."""
        self.raise_doom()
        if self.failed_call != self.call:  # or it is over for this rank too, and the next has not begun
            self._raise_failed()
        self.raise_drift()

    def _raise_failed(self) -> None:
        text = self._read(self._key("failed")).decode()
        if text and not text.split(":")[0].endswith(f"on rank {self.rank}"):
            kind = PlanMismatchError if text.startswith(PlanMismatchError.__name__) else PeerError
            raise kind(f"another rank failed: {text}")

    def raise_doom(self) -> None:
        """Raise what the heartbeat has found, if the ranks cannot go on."""
        if self.doom is not None:
            raise type(self.doom)(str(self.doom))

    def raise_drift(self) -> None:
        """Raise PlanMismatchError if the ranks have drifted apart: from then on they have no call in common."""
        if text := self._read(self._drift_key).decode():
            self._have_read("drift")
            raise PlanMismatchError(text)

    def _have_read(self, word: str) -> None:
        """Tell the others that this rank knows; the first, with which the store may end, waits for them, not long."""
        keys = [f"{self.name}/read/{word}/{r}" for r in self.ranks]
        self._write(keys[self.ranks.index(self.rank)], "")
        until = time.monotonic() + READ_SECONDS * (self.rank == self.ranks[0])
        while time.monotonic() < until and not self._are_there(keys):
            time.sleep(BEAT_SECONDS / 10)

    # --- agreement ---------------------------------------------------------------------------------------------

    def begin_call(self) -> None:
        """A new call of the model begins: what was said of earlier ones is past.

        Raises:
            PeerError: a peer failed in the call before, and this rank did not: they have no call in common any more.
        """
        self.raise_doom()
        if self.failed_call != self.call:
            self._raise_failed()
        self.call += 1
        self.compared = 0
        if self.journal is not None:
            self.journal.call = self.call
        self._at("", waits=False)

    def keep_journal(self, journal: Journal) -> None:
        """Take this journal for that of the lane that is waited for."""
        self.journal = journal
        keep(journal)

    def agree(self, what: str, text: str) -> None:
        """Check that every rank has the same `text`: each writes its digest, the first rank reads them and rules.

        Raises:
            PlanMismatchError: on every rank, with the first line that differs.
            PeerError: a peer failed before it came to compare.
        """
        self.compared += 1
        digest = hashlib.sha256(text.encode()).hexdigest()
        digests = [self._key(f"digest/{self.compared}/{r}") for r in self.ranks]
        ruling = self._key(f"ruling/{self.compared}")
        self._write(digests[self.ranks.index(self.rank)], digest)
        if self.rank == self.ranks[0]:
            self._await(digests, what)
            different = [r for r, key in zip(self.ranks, digests, strict=True) if self._read(key).decode() != digest]
            self._write(ruling, str(different[0]) if different else "same")
        self._await([ruling], what)
        if (found := self._read(ruling).decode()) != "same":
            difference = self._difference(what, text, int(found))
            self._have_read(f"{self.call}/{self.compared}")
            raise PlanMismatchError(difference)

    def exchange(self, what: str, word: str, *, num_limits: int = 1) -> list[str]:
        """The word of every rank, in their order; waits for `num_limits` times ZGRAPH_TIMEOUT at most."""
        keys = [self._key(f"{what}/{r}") for r in self.ranks]
        self._write(keys[self.ranks.index(self.rank)], word)
        self._await(keys, what, num_limits * self.limit_s)
        return [self._read(k).decode() for k in keys]

    def _await(self, keys: list[str], what: str, limit_s: float | None = None) -> None:
        """Wait until all these keys are there, unless a peer fails, or computes where it should compare."""
        nap, asked, heard, silent = _FIRST_NAP, time.monotonic(), self._beats(), 0.0
        limit_s = self.limit_s if limit_s is None else limit_s
        until = asked + limit_s
        comparison = f"the comparison of the {what}"
        self._at(comparison, waits=True)
        place, key = f"{comparison} in call {self.call}", self._key(f"{what}/{self.compared}")
        long = Wait(self.store, self.rank, self.ranks, place, self.journal, comparison=key)
        while not self._are_there(keys):
            time.sleep(nap)
            nap = min(nap * 1.5, 20 * _LONGEST_NAP)
            if time.monotonic() - asked < ASK_AFTER_SECONDS:
                continue
            asked = time.monotonic()
            self.raise_failure()
            if (waiting := self._stuck()) and not self._are_there(keys):
                raise PlanMismatchError(
                    f"rank {self.rank} compiled a new {what}, but {waiting} in one compiled before. Give every rank "
                    "inputs of the same kind and shape in the same step, or pass dynamic=True. Where each rank's data "
                    'decides what runs (which experts, say), pass fullgraph="eager".'
                )
            if not self._are_there(keys):
                self._look(long)
            if asked > until:
                self._give_up(limit_s)
            beats = self._beats()
            stopped = [r for r in self.ranks if r != self.rank and heard[r] and beats[r] == heard[r]]
            silent, heard = (silent + ASK_AFTER_SECONDS, heard) if stopped else (0.0, beats)
            if silent > GONE_AFTER_SECONDS:
                silent = 0.0
                if gone := self.gone():  # a rank may only have been too busy to beat
                    self.blame(comparison, TimeoutError("no answer"), gone)
        self._at(comparison, waits=False)

    def _difference(self, what: str, text: str, different: int) -> str:
        """Message with the first line that differs between the first rank's text and that of rank `different`."""
        pair = (self.ranks[0], different)
        keys = [self._key(f"text/{self.compared}/{r}") for r in pair]
        if self.rank in pair:
            self._write(keys[pair.index(self.rank)], zlib.compress(text.encode()))
        self._await(keys, what)
        ours, theirs = (zlib.decompress(self._read(k)).decode().splitlines() for k in keys)
        pairs = [*zip(ours, theirs, strict=False), (f"{len(ours)} lines", f"{len(theirs)} lines")]
        first, second = next((a, b) for a, b in pairs if a != b)
        return (
            f"the ranks have a different {what}. First difference:\n"
            f"  rank {self.ranks[0]}: {_short(first)}\n  rank {different}: {_short(second)}\n"
            "  Remedy: build the same model from the same configuration on every rank, and give every rank inputs of "
            "the same kind and shape (or pass dynamic=True for sizes that differ)."
        )

    @property
    def _drift_key(self) -> str:
        return f"{self.group_name}/drift"  # of all models of these ranks

    @property
    def group_name(self) -> str:
        """A name that all models of these ranks share."""
        return self.name.rpartition("/")[0]

    def _key(self, word: str) -> str:
        return f"{self.name}/{self.call}/{word}"

    # --- the store ---------------------------------------------------------------------------------------------

    def _are_there(self, keys: list[str]) -> bool:
        with store_errors():
            return self.store.check(keys)

    def _read(self, key: str) -> bytes:
        """The bytes under a key; empty if it is not there."""
        with store_errors():
            return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _write(self, key: str, value: str | bytes) -> None:
        packed: Any = value
        with store_errors():
            self.store.set(key, packed)


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def _short(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."
