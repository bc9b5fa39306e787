"""What ranks tell each other beside their data: that they live, that they failed, and what they compiled.

Heartbeats and failures go through the job's key-value store; plans are compared on a gloo group of their own, so that
no comparison can ever be mistaken for a gather.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import threading
import time
import zlib
from datetime import timedelta
from functools import lru_cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from zgraph.errors import PeerError, PlanMismatchError, ZgraphError
from zgraph.runtime import torch_private
from zgraph.runtime.torch_private import Store

BEAT_SECONDS = 0.5
GONE_AFTER_SECONDS = 3.0
ASK_AFTER_SECONDS = 0.5
_FIRST_NAP, _LONGEST_NAP = 2e-5, 1e-3


class Heartbeat(threading.Thread):
    """Writes a growing number to the store, so that others can tell a busy rank from one that is gone."""

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="zgraph-heartbeat", daemon=True)
        self.store, self.rank = store, rank
        self.over = threading.Event()
        self.start()
        atexit.register(self.stop)

    def run(self) -> None:
        for count in itertools.count():
            try:
                self.store.set(f"zgraph/beat/{self.rank}", str(count))
            except (RuntimeError, ValueError):
                return  # the store closed with the job
            if self.over.wait(BEAT_SECONDS):
                return

    def stop(self) -> None:
        """End before the interpreter does: a thread cut off inside the store's C++ code would abort the process."""
        self.over.set()
        self.join(5 * BEAT_SECONDS)


@lru_cache(maxsize=1)
def _heartbeat(store: Store, rank: int) -> Heartbeat:
    return Heartbeat(store, rank)


@lru_cache(maxsize=16)
def _control_group(ranks: tuple[int, ...], store: Store) -> torch_private.ControlGroup:
    """The group on which these ranks compare, one for each time that the job met (`store` tells the times apart)."""
    return torch_private.ControlGroup(store, "zgraph/control/" + "_".join(map(str, ranks)), ranks, dist.get_rank())


class Peers:
    """The ranks that train one model together.

    Args:
        group: their process group.
        name: a name for the model that is the same on all of them and used for no other.
        device: where the data is that they exchange. On the CPU a wait polls; a GPU's stream waits by itself.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, device: torch.device) -> None:
        self.group, self.name = group, name
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank()
        self.store = torch_private.store()
        self.control = _control_group(self.ranks, self.store)
        self.polls = device.type == "cpu"
        self.call = 0
        self.compared = 0
        _heartbeat(self.store, self.rank)

    # --- waiting -----------------------------------------------------------------------------------------------

    def wait(self, work: dist.Work, what: str) -> None:
        """Wait for a collective, unless a peer fails meanwhile.

        Raises:
            PeerError: a peer failed or is gone; the message says which.
        """
        try:
            if self.polls:
                self._poll(work, what)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, ZgraphError):
                raise
            self._blame(what, error)

    def _poll(self, work: dist.Work, what: str) -> None:
        nap, asked, told = _FIRST_NAP, time.monotonic(), False
        while not work.is_completed():
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP)
            if time.monotonic() - asked > ASK_AFTER_SECONDS:
                asked = time.monotonic()
                self.raise_failure()
                if not told:
                    self.store.set(self._key("waiting"), f"rank {self.rank} waits for {what}")
                    told = True

    def _blame(self, what: str, error: Exception) -> NoReturn:
        gone = self.gone()
        self.raise_failure()
        if gone:
            names = ", ".join(f"rank {r}" for r in gone)
            raise PeerError(
                f"{names} of {list(self.ranks)} {'is' if len(gone) == 1 else 'are'} gone: rank {self.rank} waited for "
                f"{what} and the connection broke. Start the job again from its last checkpoint."
            ) from None
        raise PeerError(f"rank {self.rank} waited for {what} and the communication failed: {error}") from None

    def gone(self) -> list[int]:
        """Ranks whose heart does not beat any more."""
        try:
            first = self._beats()
            time.sleep(GONE_AFTER_SECONDS)
            second = self._beats()
        except RuntimeError:
            return [self.ranks[0]]  # the store itself is gone, and with it the rank that kept it
        return [r for r in self.ranks if r != self.rank and first[r] == second[r]]

    def _beats(self) -> dict[int, bytes]:
        return {r: self._read(f"zgraph/beat/{r}") for r in self.ranks}

    # --- failures ----------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the peers that this rank cannot go on with the present call. Nothing happens if one told so before."""
        text = f"{type(error).__name__} on rank {self.rank}: {error}"
        try:
            self.store.compare_set(self._key("failed"), "", text[:4000])
        except RuntimeError:
            return  # the store is gone: the peers are told by the broken connections

    def raise_failure(self) -> None:
        """Raise PeerError if a peer said that it cannot go on with the present call."""
        text = self._read(self._key("failed")).decode()
        if text and not text.split(":")[0].endswith(f"on rank {self.rank}"):
            raise PeerError(f"another rank failed: {text}")

    # --- agreement ---------------------------------------------------------------------------------------------

    def agree(self, what: str, text: str) -> None:
        """Check that every rank has the same `text`.

        Raises:
            PlanMismatchError: on every rank, with the first line that differs.
            PeerError: a peer failed before it came to compare.
        """
        self.compared += 1
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        found = torch.empty(len(self.ranks) * digest.numel(), dtype=torch.uint8)
        work = self.control.all_gather(found, digest)
        began = time.monotonic()
        try:
            while not work.is_completed():
                time.sleep(_LONGEST_NAP)
                if time.monotonic() - began > ASK_AFTER_SECONDS:
                    began = time.monotonic()
                    self.raise_failure()
                    if waiting := self._read(self._key("waiting")).decode():
                        raise PlanMismatchError(
                            f"rank {self.rank} compiled a new {what}, but {waiting} in one compiled before. Give every "
                            "rank inputs of the same kind and shape in the same step, or pass dynamic=True."
                        )
            work.wait()
        except RuntimeError as error:
            if isinstance(error, ZgraphError):
                raise
            self._blame(f"the comparison of the {what}", error)
        digests = found.view(len(self.ranks), -1)
        different = [r for r, d in zip(self.ranks, digests, strict=True) if not torch.equal(d, digests[0])]
        if different:
            raise PlanMismatchError(self._difference(what, text, different))

    def _difference(self, what: str, text: str, different: list[int]) -> str:
        """What differs between the first rank's text and that of the first rank that differs from it."""
        keys = [f"{self.name}/text/{self.compared}/{r}" for r in (self.ranks[0], different[0])]
        if self.rank in (self.ranks[0], different[0]):
            packed: Any = zlib.compress(text.encode())
            self.store.set(keys[self.rank == different[0]], packed)
        self.store.wait(keys, timedelta(seconds=30))
        ours, theirs = (zlib.decompress(self.store.get(k)).decode().splitlines() for k in keys)
        pairs = [*zip(ours, theirs, strict=False), (f"{len(ours)} lines", f"{len(theirs)} lines")]
        first, second = next((a, b) for a, b in pairs if a != b)
        return (
            f"the ranks have a different {what}. First difference:\n"
            f"  rank {self.ranks[0]}: {_short(first)}\n  rank {different[0]}: {_short(second)}\n"
            "  Remedy: build the same model from the same configuration on every rank, and give every rank inputs of "
            "the same kind and shape (or pass dynamic=True for sizes that differ)."
        )

    def _key(self, word: str) -> str:
        return f"{self.name}/{self.call}/{word}"

    def _read(self, key: str) -> bytes:
        return bytes(self.store.get(key)) if self.store.check([key]) else b""


def _short(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."
