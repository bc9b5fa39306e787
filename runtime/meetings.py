"""Comparisons of what the ranks of a circle have: that they compiled the same, and what each has measured.

All of it goes through the job's key-value store, so that no comparison can ever be mistaken for a gather. The ranks are
counted as they come, the last to come rules, and the others wait for that one key. So what it costs a rank does not
depend on how many there are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from math import inf
from typing import Any, NoReturn

from zgraph.errors import PeerError, PlanMismatchError
from zgraph.runtime.circle import ASK_AFTER_SECONDS, Circle
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import Seen
from zgraph.runtime.heartbeat import BEAT_SECONDS
from zgraph.runtime.journal import begun
from zgraph.runtime.questions import read_all
from zgraph.runtime.store_errors import damaged_words, store_errors

_OVER = "over "
"""How the ruling on a comparison begins that a rank has left before its end."""


class Meetings(Circle):
    """Ranks that compare what they have."""

    def agree(self, what: str, text: str) -> None:
        """Check that every rank has the same `text`: they count its digest, and all have it if the count is theirs.

        Raises:
            PlanMismatchError: on every rank, with the first line that differs.
            PeerError: a peer failed before it came to compare.
        """
        self.compared += 1
        digest = hashlib.sha256(text.encode()).hexdigest()
        stem = self._key(f"compared/{self.compared}")
        ruling = ""
        with store_errors():
            count = self.store.add(f"{stem}/{digest}", 1)
            if count == 1 and self.store.compare_set(f"{stem}/first", "", digest) != digest.encode():
                ruling = "apart"  # there is another: no need to wait for the others
            elif count == len(self.ranks):
                ruling = "same"
        ruling = self._ruling(stem, what, ruling, self.limit_s)
        if ruling != "same":
            difference = self._difference(what, text, digest)
            self._have_read(f"{self.call}/{self.compared}")
            raise PlanMismatchError(difference)

    def exchange(self, what: str, word: str, *, num_limits: int = 1) -> list[str]:
        """The word of every rank, in their order; waits for `num_limits` times ZGRAPH_TIMEOUT at most.

        The last to come joins the words, each different one once.
        """
        stem = self._key(what)
        ruling = ""
        with store_errors():
            self.store.set(f"{stem}/{self.rank}", word)
            if self.store.add(f"{stem}/came", 1) == len(self.ranks):
                ruling = _joined([f.decode() for f in read_all(self.store, [f"{stem}/{r}" for r in self.ranks])])
        ruling = self._ruling(stem, what, ruling, num_limits * self.limit_s)
        with store_errors():
            return _parted(ruling, len(self.ranks))

    def exchange_values(self, what: str, value: Any, *, num_limits: int = 1) -> list[Any]:
        """The value of every rank, in their order, of values that JSON has; as `exchange`."""
        words = self.exchange(what, json.dumps(value), num_limits=num_limits)
        with store_errors():
            return [json.loads(word) for word in words]

    def smallest(self, what: str, place: str, number: int, seconds: float) -> int:
        """The smallest number that any rank gives; 0 if some rank is at another place, or has not come in time.

        Args:
            what: is asked for, once in a call.
            place: where this rank is.
            number: this rank's.
            seconds: how long to wait for the others.

        Raises RuntimeError if the store is gone; PeerError if a number in it is none.
        """
        with damaged_words():
            return self._smallest(what, place, number, seconds)

    def _smallest(self, what: str, place: str, number: int, seconds: float) -> int:
        stem = self._key(what)
        key, alike, digest = f"{stem}/ruling", f"{stem}/alike", hashlib.sha256(place.encode()).hexdigest()
        self.store.set(f"{stem}/{self.rank}", str(number))
        self.store.add(f"{alike}/{digest}", 1)
        if self.store.add(f"{stem}/came", 1) == len(self.ranks):
            is_one = self.store.add(f"{alike}/{digest}", 0) == len(self.ranks)
            numbers = [int(word) for word in read_all(self.store, [f"{stem}/{r}" for r in self.ranks])]
            return int(self.store.compare_set(key, "", str(min(numbers) if is_one else 0)))
        with self.ears.listen(key, "0") as ear:  # the first to say it rules
            ear.over.wait(seconds)
        return int(ear.word())

    def check(self, what: str) -> None:
        """Look whether the others are there, between two things that all do together.

        Args:
            what: this rank waits for.

        Raises:
            PeerError: one failed, ended, or is gone.
        """
        self.raise_failure()
        self.look_for_silent(what, is_default=True)
        if self.departed():
            self.blame(what, TimeoutError("no answer"))

    def tell(self, key: str, word: str) -> None:
        """Put a word under a key of the store, for others of these ranks, unless one of them has put another there.

        Raises PeerError if the store is gone.
        """
        with store_errors():
            self.store.compare_set(key, "", word)

    def told(self, key: str, what: str, limit_s: float = inf) -> str:
        """The word that another of these ranks puts under a key of the store.

        Args:
            key: of the store, used for no other word.
            what: this rank waits for.
            limit_s: how long; by default for ever.

        Raises:
            PeerError: one failed, ended, is gone (and the store with it, maybe), or has not come in time.
        """
        self._at(what, waits=True)
        until = time.monotonic() + limit_s
        with store_errors():
            with self.heart.ears.listen(key, f"{_OVER}rank {self.rank} has left, which waited for {what}") as ear:
                while not ear.over.wait(ASK_AFTER_SECONDS):
                    self.check(what)
                    if time.monotonic() > until:
                        self.give_up(limit_s)
            word = ear.word()
        if word.startswith(_OVER):
            self._raise_what_ended(word.removeprefix(_OVER))
        self._at(what, waits=False)
        return word

    def _ruling(self, stem: str, what: str, own: str, limit_s: float) -> str:
        """The ruling on a comparison.

        Args:
            stem: under which its keys are.
            what: is compared.
            own: this rank's ruling, if it is the one to make it; else empty.
            limit_s: how long to wait for another's.
        """
        key = f"{stem}/ruling"
        with store_errors():
            ruling = self.store.compare_set(key, "", own).decode() if own else self._await(key, what, limit_s)
        if ruling.startswith(_OVER):
            self._raise_what_ended(ruling.removeprefix(_OVER))
        return ruling

    def _await(self, key: str, what: str, limit_s: float) -> str:
        """The ruling under this key, unless a peer fails, or computes where it should compare."""
        comparison = f"the comparison of the {what}"
        self._at(comparison, waits=True)
        wait, seen = self.new_wait(f"{comparison} in call {self.call}", comparison=key), Seen()
        until = time.monotonic() + limit_s
        try:  # where this rank leaves, the others cannot agree any more
            with self.ears.listen(key, f"{_OVER}rank {self.rank} has left {comparison}") as ear:
                while not ear.over.wait(ASK_AFTER_SECONDS):
                    self._tell(wait)
                    self._raise_stuck(wait, what)
                    self.look(wait, comparison, seen)
                    if time.monotonic() > until:
                        self.give_up(limit_s)
        finally:
            self._tell(None)
        self._at(comparison, waits=False)
        return ear.word()

    def _raise_stuck(self, wait: Wait, what: str) -> None:
        """Raise if the next rank waits in the same call for a collective that this rank has not begun."""
        rank = self.heart.neighbour(self)
        beat = self.heart.beat_of(rank) if rank is not None else None
        if rank is None or beat is None or not wait.still_waits(rank, beat):
            return
        word = beat.wait
        if word["comparison"] or word["scope"] != wait.scope:
            return
        known = begun().get(self.journal.name, 0) if self.journal is not None else 0
        if not 0 < word["number"] <= known:
            raise PlanMismatchError(
                f"rank {self.rank} compiled a new {what}, but rank {rank} waits for {word['place']} in one compiled "
                "before. Give every rank inputs of the same kind and shape in the same step, or pass dynamic=True. "
                'Where each rank\'s data decides what runs (which experts, say), pass fullgraph="eager".'
            )

    def _raise_what_ended(self, how: str) -> NoReturn:
        """Raise why another rank has left a comparison; it tells so before it leaves, or as it ends."""
        self._raise_failed(self._read(self._key("failed")))
        self.raise_drift()
        until = time.monotonic() + 2 * BEAT_SECONDS
        while time.monotonic() < until:
            self.raise_failure()
            time.sleep(ASK_AFTER_SECONDS / 4)
        raise PeerError(f"another rank failed: {how}")

    def _difference(self, what: str, text: str, digest: str) -> str:
        """Message with the first line that differs between the first rank's text and that of the next that differs."""
        digests = self.exchange(f"digest of the {what}/{self.compared}", digest)
        different = next(i for i, found in enumerate(digests) if found != digests[0])
        pair = (self.ranks[0], self.ranks[different])
        word = text if self.rank in pair else ""
        words = self.exchange(f"text of the {what}/{self.compared}", word)
        ours, theirs = words[0].splitlines(), words[different].splitlines()
        pairs = [*zip(ours, theirs, strict=False), (f"{len(ours)} lines", f"{len(theirs)} lines")]
        first, second = next((a, b) for a, b in pairs if a != b)
        return (
            f"the ranks have a different {what}. First difference:\n"
            f"  rank {pair[0]}: {_short(first)}\n  rank {pair[1]}: {_short(second)}\n"
            "  Remedy: build the same model from the same configuration on every rank, and give every rank inputs of "
            "the same kind and shape (or pass dynamic=True for sizes that differ)."
        )


def _parted(ruling: str, num_ranks: int) -> list[str]:
    """The words that were joined. Raises ValueError if these are not the words of so many ranks."""
    found = json.loads(ruling)
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(part, list) for part in found):
        raise ValueError("words of ranks that are not joined as they are")
    different, numbers = found
    if not all(isinstance(word, str) for word in different) or len(numbers) != num_ranks:
        raise ValueError("words of other ranks than these")
    if any(type(number) is not int or not 0 <= number < len(different) for number in numbers):
        raise ValueError("a word of a rank that is not there")
    return [different[number] for number in numbers]


def _joined(words: Sequence[str]) -> str:
    """The words of all ranks, each different one once."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return json.dumps([[*numbers], [numbers[word] for word in words]])


def _short(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."
