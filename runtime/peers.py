"""The ranks that train one model together, and how one of them waits for a collective without missing who is gone."""

from __future__ import annotations

import time
from collections import Counter

import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.environment import environment
from zgraph.runtime.circle import AGAIN, ASK_AFTER_SECONDS, rank_names
from zgraph.runtime.elsewhere import Seen
from zgraph.runtime.heartbeat import GONE_AFTER_SECONDS, heartbeat
from zgraph.runtime.journal import ranks_word
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.transfers import Transfer

__all__ = ["AGAIN", "ASK_AFTER_SECONDS", "GONE_AFTER_SECONDS", "Peers", "rank_names", "unique_name", "unique_name_of"]

_FIRST_NAP, _LONGEST_NAP = 2e-5, 1e-3

_serials: Counter[tuple[int, ...]] = Counter()


def unique_name(group: dist.ProcessGroup | None) -> str:
    """A name that all ranks of the group give what they make next: its members make the same things in one order."""
    return unique_name_of(tuple(dist.get_process_group_ranks(group)) if group is not None else ())


def unique_name_of(ranks: tuple[int, ...]) -> str:
    """A name that all of these ranks give what they make next."""
    _serials[ranks] += 1
    return f"zgraph/{ranks_word(ranks)}/{_serials[ranks]}"


class Peers(Meetings):
    """The ranks that train one model together.

    Args:
        group: their process group.
        name: a name for the model that is the same on all of them and used for no other.
        device: where the data is that they exchange. On the CPU a wait polls; a GPU's stream waits by itself.

    `waited_s` counts the seconds that this process has stood still in waits: on the CPU, communication not hidden.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, device: torch.device) -> None:
        heart = heartbeat(private_runtime.store(), dist.get_rank())
        super().__init__(heart, tuple(dist.get_process_group_ranks(group)), name, environment().timeout_s)
        self.group = group
        self.polls = _is_host(device)
        self.waited_s = 0.0

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
        seconds = time.perf_counter() - began
        self.waited_s += seconds
        self.heart.pace.waited(what, seconds)

    def _poll(self, work: dist.Work | Transfer, what: str) -> None:
        nap, asked = _FIRST_NAP, time.monotonic()
        number = work.number if isinstance(work, Transfer) else 0
        wait, seen = self.new_wait(f"{what} in call {self.call}", number), Seen()
        until = asked + self.limit_s
        try:
            while not work.is_completed():
                if isinstance(work, Transfer):
                    work.over.wait(ASK_AFTER_SECONDS)
                else:
                    time.sleep(nap)
                    nap = min(nap * 1.5, _LONGEST_NAP)
                if time.monotonic() - asked > ASK_AFTER_SECONDS:
                    asked = time.monotonic()
                    self.heart.wait = wait
                    if number:
                        self.look(wait, what, seen)
                    else:
                        wait.looks += 1
                        self.raise_failure()
                        self.look_for_silent(what)
                    if asked > until:
                        self.give_up(self.limit_s)
        finally:
            self.heart.wait = None


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
