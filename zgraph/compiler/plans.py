"""Plans from where they are: a folder of this user, another rank, or else the passes.

Each rank captures its model by itself, so what is reused is only what follows from the captured graph. Ranks that come
together tell each other the keys of their graphs. Of those with one key, the first that has the plan gives it to the
others; where none has it, the first of them runs the passes for all.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zgraph.certify.certificate import Certifier
from zgraph.certify.record import Certificate
from zgraph.compiler.plan_folder import PlanFolder
from zgraph.errors import KeptPlanWarning, RunFileError, VerifyError, in_one_line
from zgraph.ir import Graph
from zgraph.passes import Context
from zgraph.runfile.format import has_backward
from zgraph.runfile.kept import Kept, read_kept, read_word
from zgraph.runtime import Session

MAX_WORD = 4 << 20
"""Letters of a plan that the job's key-value store passes on; it takes 8 MiB at once."""

_NONE = "none"
"""Word of a rank whose passes failed, or whose plan is too long: each of the others runs its own."""


@dataclass(frozen=True)
class Found:
    """A kept plan that was checked.

    Args:
        plan: as it is kept.
        certificate: of it, against the graph that was captured here.
        source: where it comes from, in words.
    """

    plan: Kept
    certificate: Certificate
    source: str


@dataclass
class Plans:
    """Plans of one model.

    Args:
        session: of its ranks.
        options: text of the options that it was compiled with.
        folder: where plans are kept; None keeps none between runs.

    `counts` has how many came from where, in words.
    """

    session: Session
    options: str
    folder: PlanFolder | None
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return "; ".join(f"{count} {source}" for source, count in self.counts.items())

    def find(self, key: str, captured: Graph, context: Context, *, together: bool) -> Found | Giving:
        """The plan of a key, or what to do for those that wait for it while the passes run here.

        Args:
            key: see `zgraph.compiler.plan_key`; empty for a plan that is neither kept nor given.
            captured: the graph, which a plan is checked against.
            context: what the passes know.
            together: whether all ranks are here with their first graph of this kind.

        Raises:
            PeerError: the rank that has the plan failed, ended, is gone, or does not give it within ZGRAPH_TIMEOUT.
        """

        def checked(plan: Kept, source: str) -> Found:
            certifier = Certifier(captured, context, thorough=False)
            plan.tell(certifier)
            return Found(plan, certifier.finish(), source)

        own = self._kept(key, checked)
        giving = Giving(self, key)
        if together and not self.session.is_alone:
            peers = self.session.peers
            stem = f"{peers.name}/{peers.call}/plan/{key}"
            told = peers.exchange_values(f"plans/{has_backward(captured)}", [key, own is not None])
            alike = {rank: has for rank, (other, has) in zip(peers.ranks, told, strict=True) if other == key}
            giver = next((rank for rank, has in alike.items() if has), next(iter(alike)))
            if not key:
                return giving
            if giver == peers.rank and not all(has for rank, has in alike.items() if rank != giver):
                giving = Giving(self, key, stem)
            elif own is None and giver != peers.rank:
                own = self._given(peers.told(stem, f"the plan of rank {giver}", peers.limit_s), key, giver, checked)
        if own is None:
            return giving
        giving.give(own.plan)
        self.counts[f"reused from {own.source}"] += 1
        return own

    def _kept(self, key: str, checked: Callable[[Kept, str], Found]) -> Found | None:
        """The plan that the folder has, if it is right."""
        if not key or self.folder is None or (held := self.folder.find(key)) is None:
            return None
        try:
            return checked(read_kept(held, key), shown(self.folder.folder))
        except (RunFileError, VerifyError) as error:
            self.folder.refuse(key, in_one_line(error))
            return None

    def _given(self, word: str, key: str, giver: int, checked: Callable[[Kept, str], Found]) -> Found | None:
        """The plan that another rank gives, if it is right. It is kept here, too."""
        if word == _NONE:
            return None
        try:
            found = checked(read_word(word, key), f"rank {giver}")
        except (RunFileError, VerifyError) as error:
            warnings.warn(f"the plan of rank {giver} is not used: {in_one_line(error)}", KeptPlanWarning, stacklevel=2)
            return None
        if self.folder is not None:
            self.folder.keep(key, found.plan.to_bytes())
        return found


@dataclass
class Giving:
    """A plan that is to be made here, kept, and given to those that wait for it.

    Args:
        plans: of the model.
        key: of the plan.
        stem: the key of the store under which others wait; empty if none does.
    """

    plans: Plans
    key: str
    stem: str = ""

    def give(self, plan: Kept | None) -> None:
        """Give the plan to those that wait, once; None if there is none, and they must make their own."""
        if self.stem:
            word = plan.to_word() if plan is not None else _NONE
            self.plans.session.peers.tell(self.stem, word if len(word) <= MAX_WORD else _NONE)
            self.stem = ""

    @property
    def is_wanted(self) -> bool:
        """Whether the plan is for anyone but this rank in this run."""
        return bool(self.stem or (self.key and self.plans.folder is not None))

    def keep(self, plan: Kept) -> None:
        """Keep a plan that was certified, for the next run."""
        if self.plans.folder is not None:
            self.plans.folder.keep(self.key, plan.to_bytes())


def shown(folder: Path) -> str:
    """A folder as people write it."""
    return str(folder).replace(str(Path.home()), "~", 1)
