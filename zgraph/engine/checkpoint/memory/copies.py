"""Copies of an engine's shards, made every so many steps: each rank's on its own host, and on the next.

A snapshot goes to a thread, which writes it where shared memory is, and fetches that of the rank before. The threads
agree that all have done so; until then, the copies before stay. A job that starts again finds the newest copies of
which all shards are somewhere, and each rank fetches what it needs.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.background import Background, Snapshot, said
from zgraph.engine.checkpoint.directory import write_text
from zgraph.engine.checkpoint.files import read_json
from zgraph.engine.checkpoint.index import Index, RankFiles, files_name
from zgraph.engine.checkpoint.memory.choice import Choice, Copy, choose, neighbours
from zgraph.engine.checkpoint.memory.links import Address, Client, Server, own_address, retried
from zgraph.engine.checkpoint.memory.reading import CopyReader
from zgraph.engine.checkpoint.memory.shelf import Mark, Shelf
from zgraph.engine.checkpoint.ranks import Beside, raise_together
from zgraph.engine.checkpoint.rests import rests_of
from zgraph.engine.checkpoint.state import tensors_of, texts_of
from zgraph.engine.checkpoint.storage import INDEX, Writer
from zgraph.environment import environment
from zgraph.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

log = logging.getLogger("zgraph")

GENERATIONS = 2
"""Copies of each rank that a host has."""


class Found(NamedTuple):
    """Copies to go on from.

    `near` are the ranks whose copies are whole on this host; `place` is the folder of all copies here, with the mark.
    """

    choice: Choice
    near: frozenset[int]
    place: str


class Keepers(NamedTuple):
    """The ranks that keep copies for one another.

    `hosts` has a name of each rank's host, `addresses` where each serves, and `kept` the ranks whose copies this one
    fetches; `here` are all whose copies belong on this host. `mark` is that of this attempt, at step 0.
    """

    shelf: Shelf
    server: Server
    hosts: list[str]
    addresses: list[Address]
    kept: list[int]
    here: set[int]
    mark: Mark


class Copies:
    """Makes copies of an engine's shards in memory, and finds them again.

    Args:
        engine: which.

    Raises:
        UsageError: the job has no name by which its copies would be found again.
    """

    def __init__(self, engine: Trains) -> None:
        self.engine, self.ranks = engine, engine.ranks
        self.keys = engine.config.keys.checkpoint.memory
        self.job = self.keys.job or job_name()
        if (replica := os.environ.get("ZGRAPH_ELASTIC_REPLICA", "")).isdigit() and self.job:
            self.job += f".replica_{replica}"
        if not self.job:
            raise UsageError(
                "checkpoint.memory: no launcher says what this job is called, so that its copies would not be found "
                'when it starts again; give "job" there, or torchrun --rdzv-id'
            )
        self.last: Mark | None = None
        self._making = Mark(0, 0, "")
        self._background = Background(self.ranks, "copies in memory", self._finish)
        self._keepers: Keepers | None = None
        self._is_made = False
        atexit.register(_at_exit, weakref.ref(self))

    # --- making ------------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the step that has ended is one to copy."""
        return self.engine.global_steps % self.keys.every == 0

    def make(self) -> None:
        """Take a snapshot, and copy it while training goes on. All ranks call it, between two steps.

        Raises:
            CheckpointError: no copy can be made; on all ranks.
            PeerError: a rank is gone.
        """
        self.wait()
        keepers = self._joined()
        mark = self._making = keepers.mark._replace(step=self.engine.global_steps)
        session = compiled_model(self.engine.module).session

        _ = self.engine.skipped_steps  # what the device has left out is taken back first
        texts = texts_of(self.engine, {}, of_all=True)
        draft = keepers.shelf.draft(self.ranks.rank, mark)
        tensors = tensors_of(self.engine) | rests_of(self.engine)
        writer = Writer(draft, self.ranks.rank, texts, lambda: None, lambda: session.doom)
        self._background.begin(tensors, writer, self.engine.config.keys.checkpoint.memory_bytes)

    def wait(self) -> None:
        """Wait until the copy that is under way is made.

        Raises:
            CheckpointError: the first copy could not be made, on all ranks. Later ones are told, and those before stay.
            PeerError: a rank is gone.
        """
        try:
            self._background.wait()
        except CheckpointError as error:
            if not self._is_made:
                raise
            if self.ranks.rank == 0:
                log.warning("%s; that of step %d stays", error, self.last.step if self.last is not None else -1)

    def _finish(self, snapshot: Snapshot, writer: Writer, beside: Beside) -> None:
        """Write this rank's copy, fetch that of the rank before, and agree with all that it is done."""
        keepers = self._joined()
        mark, problem, own = self._making, "", [self.ranks.rank, *keepers.kept]
        try:
            index = self._write(snapshot, writer, keepers, mark)
            for rank in keepers.kept:
                check = partial(beside.check, f"the copy of rank {rank}")
                retried(partial(self._fetch, keepers, rank, mark, index), check, environment().timeout_s)
        except Exception as error:  # whatever it is, the others wait for a word
            problem = said(error)
            keepers.server.give_up(mark)
            for rank in own:  # at once: memory may be what was lacking
                keepers.shelf.drop_drafts(rank)
        told = dict(enumerate(beside.gather(problem)))
        if any(told.values()):
            keepers.shelf.remove_of(mark, own)
        raise_together({r: f"no copy in memory of step {mark.step}: {text}" for r, text in told.items() if text})
        self.last, self._is_made = mark, True

    def _write(self, snapshot: Snapshot, writer: Writer, keepers: Keepers, mark: Mark) -> Index:
        """Write this rank's copy."""
        try:
            keepers.shelf.remove_but(self.last, mark)
            if snapshot.index is not None:
                self._check_limit(snapshot.index, keepers)
            keepers.shelf.begin(writer.folder)
        except BaseException:
            snapshot.drop()
            raise
        index = snapshot.write(writer)
        write_text(writer.folder / INDEX, index.model_dump_json())
        keepers.shelf.complete(writer.folder, self.ranks.rank, mark)
        return index

    def _fetch(self, keepers: Keepers, rank: int, mark: Mark, index: Index) -> bool:
        """Fetch a copy of another rank's shards; False if that rank has not written it yet."""
        with Client(keepers.addresses[rank]) as client:
            draft = keepers.shelf.draft(rank, mark)
            keepers.shelf.begin(draft)
            fetch = partial(client.fetch, rank, mark)
            if not fetch(files_name(rank), draft / files_name(rank), _room(draft)):
                return False
            for file in (*read_json(draft / files_name(rank), RankFiles).files, INDEX):
                if not fetch(file, draft / file, _room(draft)):
                    raise CheckpointError(f"the copy of rank {rank} has no {file}")
        if (found := keepers.shelf.check_in(draft, rank)).checksum != index.checksum:
            raise CheckpointError(f"the copy of rank {rank} has another index: {found.checksum}")
        keepers.shelf.complete(draft, rank, mark)
        return True

    def _check_limit(self, index: Index, keepers: Keepers) -> None:
        if self.keys.limit is None:
            return
        most = int(self.keys.limit)
        needed = GENERATIONS * sum(index.bytes_of(rank) for rank in (self.ranks.rank, *keepers.kept))
        if needed > most:
            raise CheckpointError(
                f"the copies that rank {self.ranks.rank} keeps take {needed} bytes, and checkpoint.memory.limit is "
                f"{most}: raise it, or shard over more ranks"
            )

    # --- joining -----------------------------------------------------------------------------------------------------

    def _joined(self) -> Keepers:
        """The ranks that keep copies, who first tell one another where they are. All ranks call it."""
        if self._keepers is None:
            self._keepers = self._join()
        return self._keepers

    def _join(self) -> Keepers:
        ranks = self.ranks
        shelf = ranks.together(lambda: Shelf.of(self.keys.folder, self.job or ""))
        ranks.together(lambda: shelf.hold(ranks.rank, self))
        hosts = self._hosts(shelf)
        told = ranks.gather(own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")))
        own = told[ranks.rank]
        if own.startswith("127."):
            own = own_address(next((address for address in told if not address.startswith("127.")), own))
        server = ranks.together(lambda: Server(shelf, own))
        addresses = ranks.gather(server.address)
        beyond = neighbours(hosts)
        if not beyond and ranks.rank == 0:
            log.warning("checkpoint.memory: all ranks are on one host; copies outlive the processes, and not the host")
        attempts = ranks.gather((max((mark.attempt for mark, _ in shelf.copies()), default=0), secrets.token_hex(8)))
        mark = Mark(max(number for number, _ in attempts) + 1, 0, attempts[0][1])
        kept = [rank for rank, keeper in beyond.items() if keeper == ranks.rank]
        own_host = hosts[ranks.rank]
        here = {rank for rank, host in enumerate(hosts) if own_host in (host, hosts[beyond.get(rank, rank)])}
        return Keepers(shelf, server, hosts, addresses, kept, here, mark)

    def _hosts(self, shelf: Shelf) -> list[str]:
        """For each rank the first whose folder is the same: ranks that share one lose it together."""
        ranks = self.ranks
        mine = ranks.together(lambda: shelf.meeting(ranks.rank))
        names = ranks.gather(mine.name)
        seen = [rank for rank, name in enumerate(names) if (shelf.folder / name).exists()]
        hosts = ranks.gather(str(min(seen)))  # all have looked then
        mine.unlink()
        return hosts

    # --- going on ----------------------------------------------------------------------------------------------------

    def find(self, *, newer_than: int) -> Found | None:
        """The newest copies of which all ranks' shards are somewhere; None if there are none. All ranks call it.

        Args:
            newer_than: the step of the checkpoint on disk, which is as good; -1 if there is none.
        """
        keepers, ranks = self._joined(), self.ranks
        told = ranks.gather(ranks.together(lambda: self._checked(keepers)))
        copies = [copy for found in told for copy in found]
        choice, lack = choose(copies)
        taken = choice is not None and choice.mark.step > newer_than
        if ranks.rank == 0 and copies:
            from_disk = f"the checkpoint on disk of step {newer_than}" if newer_than >= 0 else "nothing on disk"
            if choice is not None and taken:
                age_s = keepers.shelf.age_s(choice.mark)
                what = f"by copies in memory of job {self.job}, made {age_s:.0f} s ago"
                log.warning("goes on from step %d, %s%s", choice.mark.step, what, lack and f"; {lack}")
            else:
                log.warning("goes on from %s: %s", from_disk, lack or "what is in memory is no newer")
        if choice is None or not taken:
            return None
        self.last = choice.mark
        alike = [copy for copy in copies if (copy.mark, copy.checksum) == (choice.mark, choice.checksum)]
        here = keepers.hosts[ranks.rank]
        near = frozenset(copy.rank for copy in alike if keepers.hosts[copy.holder] == here)
        return Found(choice, near, str(keepers.shelf.folder / str(choice.mark)))

    def reader(self, found: Found) -> CopyReader:
        """A reader of copies, which brings what this rank needs to its host."""
        keepers = self._joined()
        return CopyReader(keepers.shelf, found.choice, found.near, keepers.addresses, self.ranks.rank)

    def _checked(self, keepers: Keepers) -> list[Copy]:
        """The copies here that are what was written, as far as they are this rank's to check."""
        near = [rank for rank, host in enumerate(keepers.hosts) if host == keepers.hosts[self.ranks.rank]]
        found = []
        for mark, rank in sorted(keepers.shelf.copies())[near.index(self.ranks.rank) :: len(near)]:
            try:
                index = keepers.shelf.check_in(keepers.shelf.place(rank, mark), rank)
            except (CheckpointError, OSError) as error:
                log.warning("a copy in memory is not used: %s", error)
                continue
            found.append(Copy(mark, rank, index.num_ranks, index.checksum or 0, self.ranks.rank))
        return found

    # --- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove the copies that this rank keeps: the job has come to its end.

        Raises:
            PeerError: a rank is gone.
        """
        self.wait()
        self.forget()

    def forget(self) -> None:
        """Remove the copies that this rank keeps."""
        keepers, self._keepers = self._keepers, None
        if keepers is not None:
            keepers.server.close()
            is_first = keepers.hosts.index(keepers.hosts[self.ranks.rank]) == self.ranks.rank
            left = keepers.shelf.ranks() - keepers.here if is_first else set()  # of other numbers of ranks
            keepers.shelf.remove([self.ranks.rank, *keepers.kept, *left])

    def not_ours(self, found: Found, error: CheckpointError) -> CheckpointError:
        """An error of loading copies, with what to do if they are another run's."""
        return CheckpointError(
            f"copies in memory of job {self.job}, step {found.choice.mark.step}: {error}. If they are of another run, "
            f"give another checkpoint.memory.job, or remove {Path(found.place).parent} on all hosts"
        )


def job_name() -> str | None:
    """A name that the launcher gives a job, and keeps when its processes start again; None if it says none."""
    names = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    return next((n for n in names if n != "none" and n.replace("-", "").replace("_", "").isalnum()), None)


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _at_exit(ref: weakref.ref[Copies]) -> None:
    """Remove the copies of a job whose script has come to its end; one that failed finds them when it starts again."""
    copies = ref()
    has_failed = getattr(sys, "last_exc", None) is not None or getattr(sys, "last_value", None) is not None
    if copies is not None and not has_failed and compiled_model(copies.engine.module).session.doom is None:
        copies.forget()
