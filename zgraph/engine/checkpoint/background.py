"""Writing a checkpoint while training goes on: a snapshot goes through bounded memory to a thread, which writes it.

The ranks' threads agree through the store, so that training's collectives are not disturbed. The checkpoint is there,
and `latest` says so, when all of them have written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from zgraph.engine.checkpoint.files import Written, write_parts
from zgraph.engine.checkpoint.index import Index, index_of
from zgraph.engine.checkpoint.ranks import Beside, Ranks
from zgraph.engine.checkpoint.shards import finish_shards
from zgraph.engine.checkpoint.staging import Pipe, Staging, usual_limit
from zgraph.engine.checkpoint.storage import Writer
from zgraph.engine.checkpoint.tensors import Tensors
from zgraph.errors import CheckpointError, ZgraphError

log = logging.getLogger("zgraph")

_WRITING: set[Future[None]] = set()
"""All that this process writes now, of any engine."""


def settle_files() -> None:
    """Wait until no engine of this process writes a checkpoint: somebody is about to read one, or to write another.
    What went wrong is raised by the engine that it belongs to.
    """
    wait(list(_WRITING))


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on its way to the thread that writes it.

    `index` and `files` are what is written, and `pipe` has the bytes, or the problem.
    """

    index: Index | None
    files: Mapping[Path, list[str]]
    pipe: Pipe

    def write(self, writer: Writer) -> Index:
        """Write this rank's files, and give the index.

        Raises:
            CheckpointError: the snapshot could not be taken, or the folder cannot be written to.
        """

        def write_file(path: Path) -> Written:
            with closing(self.pipe.parts()) as parts:
                return write_parts(path, parts)

        try:
            writer.write_all(self.files, write_file)
        finally:
            self.pipe.finish()
        if self.index is None:
            raise CheckpointError("it has no index")
        return self.index

    def drop(self) -> None:
        """Take all that comes, and write nothing of it: what has the tensors waits until somebody does."""
        with suppress(CheckpointError):
            self.pipe.finish()


Finish = Callable[[Snapshot, Writer, Beside], None]
"""Writes a snapshot, and completes it with the threads of the other ranks."""


class Background:
    """Writes snapshots of an engine in a thread, one at a time.

    Args:
        ranks: those of the engine.
        name: of what it writes, for messages.
        finish: called in the thread.
    """

    def __init__(self, ranks: Ranks, name: str, finish: Finish) -> None:
        self.ranks, self.staging = ranks, Staging()
        self._name, self._finish = name, finish
        self._thread = ThreadPoolExecutor(1, name)
        self._writing: Future[None] | None = None

    @cached_property
    def _beside(self) -> Beside:
        return self.ranks.beside(f"files of the {self._name}")

    def begin(self, tensors: Tensors, writer: Writer, limit_bytes: int | None) -> None:
        """Take a snapshot of the tensors, and begin to write it. All ranks call it, when nothing else is written.

        Args:
            tensors: they may change when this returns.
            writer: of the files.
            limit_bytes: how much of the host's memory is taken; by default a part of what is free. What is more waits
                until files have taken it.
        """
        beside, pipe = self._beside, Pipe(self.staging)
        index: Index | None = None
        mine: Tensors = {}
        files: Mapping[Path, list[str]] = {}
        problem = ""
        try:
            index = index_of(tensors, self.ranks.members)
            mine = writer.mine(index, tensors)
            files = writer.files(mine)
        except (RuntimeError, ZgraphError) as error:
            problem = said(error)
        limit_bytes = usual_limit() if limit_bytes is None else limit_bytes
        self.staging.allow(limit_bytes, is_pinned=any(tensor.is_cuda for tensor in mine.values()))
        later = replace(writer, doom=lambda: None)  # what is torn is told when the snapshot is taken
        self._writing = self._thread.submit(self._finish, Snapshot(index, files, pipe), later, beside)
        _WRITING.add(self._writing)
        self._writing.add_done_callback(_WRITING.discard)
        try:
            if not problem:
                problem = "it was interrupted"
                pipe.fill(files, mine)
                problem = said(doom) if (doom := writer.doom()) is not None else ""
        except (RuntimeError, MemoryError, ZgraphError) as error:
            problem = said(error)
        finally:
            pipe.end(problem)

    def wait(self) -> None:
        """Wait until what is written is on disk.

        Raises:
            CheckpointError: it could not be written.
            PeerError: a rank is gone.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def complete(snapshot: Snapshot, writer: Writer, beside: Beside) -> None:
    """Write a snapshot as a checkpoint, and complete it when all ranks have written.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    try:
        finish_shards(lambda: snapshot.write(writer), writer, beside.gather)
    except ZgraphError as error:
        log.error("%s", error)
        if writer.rank == 0:
            shutil.rmtree(writer.folder, ignore_errors=True)
        raise


def said(error: BaseException) -> str:
    """Message of an error; its kind if it has none."""
    return str(error) or type(error).__name__
