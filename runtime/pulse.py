"""Answers of an elastic job's key-value store within a limit, and the beats of one rank of a replica in it.

The store is beyond the replica's own process group and its heartbeat, which end with the replica. A rank writes its
beat and reads that of its twin, the rank with the same shard in the next replica: two questions a beat, whatever the
number of ranks. Of ranks that are known to have ended, all read the count.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from zgraph.bridge.private_runtime import PrefixStore, Store, tcp_store
from zgraph.errors import PeerError
from zgraph.runtime.questions import claim, is_there, listed, peek

T = TypeVar("T")

STORE_LIMIT_S = 25.0
"""How long the store may take to answer, before the rank ends. A cut link that is mended sooner harms nobody."""
_DAYS = timedelta(days=20)
PREFIX = "zgraph/elastic"
GONE = "gone"
MOST_WORDS = 4096
"""Of a list in the store that are read at a time."""


class Member(NamedTuple):
    """One life of a replica: it has another number each time it joins."""

    replica: int
    life: int

    def __str__(self) -> str:
        return f"{self.replica}.{self.life}"

    @staticmethod
    def parse(found: Any) -> Member:
        """The member that two numbers of JSON are. Raises ValueError for anything else."""
        if not isinstance(found, list) or [type(number) for number in found] != [int, int] or min(found) < 0:
            raise ValueError(f"{str(found)[:80]} is no replica and its life")
        return Member(*found)


class Line:
    """A connection to the store that is asked by one thread at a time, and whose answers have a limit.

    Args:
        host, port: of the store.
        limit_s: for each answer.

    Raises:
        PeerError: nobody answers there.
    """

    def __init__(self, host: str, port: int, limit_s: float = STORE_LIMIT_S) -> None:
        self.place, self.limit_s = f"{host}:{port}", limit_s
        self._questions: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]]] = queue.SimpleQueue()
        self._address = host, port
        self._idle: list[Store] = []
        threading.Thread(target=self._work, name="zgraph-elastic-store", daemon=True).start()
        self.ask(lambda store: store.add("callers", 1))

    def _work(self) -> None:
        store: Store | None = None
        while True:
            question, answer = self._questions.get()
            try:
                store = store if store is not None else self.connect()
                answer.set_result(question(store))
            except Exception as error:
                answer.set_exception(error)

    def ask(self, question: Callable[[Store], T]) -> T:
        """The answer of the store.

        Raises:
            PeerError: it is gone, or does not answer within the limit.
        """
        answer: Future[T] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(self.limit_s)
        except LateError:
            why = f"did not answer within {self.limit_s:g} s"
        except RuntimeError as error:
            why = f"does not answer ({error})"
        raise PeerError(
            f"the elastic job's key-value store at {self.place} {why}: the launcher is gone, or this host is cut off. "
            "This replica ends; a launcher that lives starts it again"
        )

    def when_set(self, key: str) -> Future[bytes]:
        """The bytes under a key, once it is there, on a connection that nobody uses meanwhile."""
        found: Future[bytes] = Future()

        def wait() -> None:
            try:
                store = self._idle.pop() if self._idle else self.connect()
                store.set_timeout(_DAYS)
                word = bytes(store.get(key))
                while not word and not is_there(store, key):  # woken by another's comparison
                    word = bytes(store.get(key))
                self._idle.append(store)
                found.set_result(word)
            except RuntimeError as error:
                found.set_exception(error)

        threading.Thread(target=wait, name="zgraph-elastic-ear", daemon=True).start()
        return found

    def connect(self) -> Store:
        """Another connection. Raises RuntimeError if the store is gone."""
        host, port = self._address
        store, _ = tcp_store(host, port, timedelta(seconds=self.limit_s))
        return PrefixStore(PREFIX, store)


def say_gone(store: Store, member: Member, why: str) -> None:
    """Tell all that this life of a replica has ended; whoever knows of it does so, as the launcher.

    Raises RuntimeError if the store is gone.
    """
    claim(store, GONE, store.add(f"{GONE}/count", 0), json.dumps([list(member), why[:500]]))
    store.add(f"{GONE}/count", 1)  # at which all look: it says that there is more to read


def beat_key(member: Member, shard: int) -> str:
    """The key of a rank's beat."""
    return f"beat/{member}/{shard}"


class Place(NamedTuple):
    """A rank's last word: the number of its beat, its step, whether it waits there for other replicas, and whether it
    has the state of that step: not behind a rehearsal, until it has taken that of a twin.
    """

    beat: int
    step: int
    waits: bool
    has_state: bool

    @staticmethod
    def parse(word: bytes) -> Place | None:
        """The place that a beat says; None where there is no beat, or what is there is none."""
        parts = word.split()
        if len(parts) != 4 or not all(part.isdigit() and len(part) < 16 for part in parts):
            return None
        return Place(int(parts[0]), int(parts[1]), parts[2] == b"1", parts[3] == b"1")


class Pulse(threading.Thread):
    """Beats of this rank, and who of the others has ended.

    Args:
        line: to the store; the pulse has another connection.
        gone_s: seconds without a beat after which a rank is gone.

    `gone` are lives that have ended, and why; `silent` says of the twin that it is not heard; `lost` why the store
    cannot be asked any more.
    """

    def __init__(self, line: Line, gone_s: float) -> None:
        super().__init__(name="zgraph-elastic-pulse", daemon=True)
        self._line = Line(*_host_and_port(line.place), limit_s=line.limit_s)
        self.gone_s, self.beat_s = gone_s, min(1.0, gone_s / 5)
        self.key, self.twin = "", ""
        self.step, self.waits, self.has_state = 0, False, True
        self.gone: dict[Member, str] = {}
        self.silent, self.lost = "", ""
        self._heard, self._beats, self._since = b"", 0, time.monotonic()
        self._num_gone, self._count = 0, -1
        self._lock = threading.Lock()
        self.over = threading.Event()
        self.start()

    def follow(self, key: str, twin: str) -> None:
        """Beat under a key from now on, and listen to another; empty listens to none."""
        with self._lock:
            self.key, self.twin = key, twin
            self._heard, self._beats, self._since, self.silent = b"", 0, time.monotonic(), ""
        self.beat(0)

    def run(self) -> None:
        for count in itertools.count(1):
            if self.over.wait(self.beat_s):
                return
            try:
                self.beat(count)
            except PeerError as error:
                self.lost = str(error)
                return

    def beat(self, count: int) -> None:
        """One beat. Raises PeerError if the store does not answer."""
        key, twin = self.key, self.twin
        has_state = self.has_state  # read before the step, which is written before it
        word = f"{count} {self.step} {int(self.waits)} {int(has_state)}"
        if key:
            self._line.ask(lambda store: store.set(key, word))
        heard = self._line.ask(self._listen(twin))
        with self._lock:
            if twin == self.twin:
                self._hear(heard)

    def _hear(self, heard: bytes) -> None:
        now = time.monotonic()
        if heard != self._heard or not heard:  # one that was never heard is on its way
            self._heard, self._beats, self._since, self.silent = heard, 0, now, ""
            return
        self._beats += 1  # where this machine is slow, others are too: counted in beats as well
        if self.twin and self._beats > self.gone_s / self.beat_s * 0.7 and now - self._since > self.gone_s:
            self.silent = self.twin

    def _listen(self, twin: str) -> Callable[[Store], bytes]:
        """A question: reads who has ended, and returns the twin's beat."""

        def question(store: Store) -> bytes:
            if self._count < 0:
                store.add(f"{GONE}/count", 0)  # so that it is there to read
                self._count = 0
            is_known = bool(twin and self._heard and twin == self.twin)
            words = store.multi_get([f"{GONE}/count", *([twin] if is_known else [])])
            if (count := int(bytes(words[0]))) != self._count:
                for word in listed(store, GONE, self._num_gone, MOST_WORDS):
                    self._note(word)
                    self._num_gone += 1
                self._count = count
            return bytes(words[1]) if is_known else peek(store, twin) if twin else b""

        return question

    def _note(self, word: bytes) -> None:
        try:
            member, why = json.loads(word[:4096])
            self.gone[Member.parse(member)] = str(why)[:500]
        except (ValueError, TypeError, RecursionError):
            return  # no such word is ours

    def stop(self) -> None:
        """End, before the interpreter does."""
        self.over.set()
        self.join(2 * self.beat_s)


def _host_and_port(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host, int(port)
