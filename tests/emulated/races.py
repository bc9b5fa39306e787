"""Races in a log of the device: accesses to the same bytes that nothing orders.

A vector clock for each stream and each thread of the host (C. Fidge, 1988; L. Lamport's happens-before): what runs on a
stream comes after all that its host did before the launch, after what was on the stream before, and after what events
made the stream wait for. The host comes after the device where it synchronises. A free counts as a write on the stream
of the block's pool, since the next allocation there gets the block at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.emulated.cuda import Entry

Clock = dict[int, int]

PAGE_BITS = 14
"""Accesses are looked up by pages of so many bits."""


@dataclass(frozen=True)
class Race:
    """Two entries that touch the same bytes in no order, one of them writing."""

    first: Entry
    second: Entry

    def __str__(self) -> str:
        return f"{_said(self.first)} and {_said(self.second)}"


def _said(entry: Entry) -> str:
    return f"{entry.name} on {f'stream {entry.stream}' if entry.stream >= 0 else f'host thread {-entry.stream}'}"


@dataclass(slots=True)
class _Past:
    """An access so far."""

    begin: int
    end: int
    stream: int
    time: int
    writes: bool
    entry: Entry


def races(entries: Iterable[Entry], is_left_out: Callable[[Entry], bool] = lambda entry: False) -> list[Race]:
    """The races of a log, one for each pair of names and streams.

    Args:
        entries: the log.
        is_left_out: says of a wait whether it is taken for one that nobody asked for.
    """
    detector = _Detector()
    for entry in entries:
        if not (entry.waits and is_left_out(entry)):
            detector.see(entry)
    return [*detector.found.values()]


class _Detector:
    """Clocks of all streams and threads, and the accesses that later ones are compared with."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = defaultdict(dict)
        self.events: dict[int, Clock] = {}
        self.past: dict[int, list[_Past]] = defaultdict(list)
        self.found: dict[tuple[str, int, str, int], Race] = {}

    def see(self, entry: Entry) -> None:
        host, own = self.clocks[entry.host], self.clocks[entry.stream]
        if entry.kind == "record":
            _join(own, host)
            self.events[entry.event] = dict(own)
        elif entry.kind == "block":
            _join(own, self.events.get(entry.event, {}))
        elif entry.kind in ("sync_event", "query_event"):
            _join(host, self.events.get(entry.event, {}))
        elif entry.kind == "sync_stream":
            _join(host, own)
        elif entry.kind == "sync_device":
            for stream in [s for s in self.clocks if s >= 0]:
                _join(host, self.clocks[stream])
        else:
            self._access(entry, host, own)

    def _access(self, entry: Entry, host: Clock, own: Clock) -> None:
        _join(own, host)
        own[entry.stream] = own.get(entry.stream, 0) + 1
        for access in entry.accesses:
            if not access.num_bytes:
                continue
            begin, end = access.address, access.address + access.num_bytes
            now = _Past(begin, end, entry.stream, own[entry.stream], access.writes, entry)
            for page in range(begin >> PAGE_BITS, ((end - 1) >> PAGE_BITS) + 1):
                before = self.past[page]
                for past in _meeting(before, now):
                    if past.stream != now.stream and past.time > own.get(past.stream, 0):
                        key = past.entry.name, past.stream, entry.name, entry.stream
                        self.found.setdefault(key, Race(past.entry, entry))
                self.past[page] = [p for p in before if not _covers(now, p)]
                self.past[page].append(now)


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        if clock.get(stream, 0) < time:
            clock[stream] = time


def _meeting(before: Iterable[_Past], now: _Past) -> Iterator[_Past]:
    """Those that touch the same bytes, where one of both writes."""
    return (p for p in before if p.begin < now.end and now.begin < p.end and (p.writes or now.writes))


def _covers(now: _Past, past: _Past) -> bool:
    """Whether all that races with an access also races with a later one, or has been compared with it."""
    is_inside = now.begin <= past.begin and past.end <= now.end
    return is_inside and (now.writes or (past.stream == now.stream and not past.writes))
