"""Writing a checkpoint while training goes on: a snapshot goes through bounded memory to a thread, which writes it.

The ranks' threads agree through the store, so that training's collectives are not disturbed. The checkpoint is there,
and `latest` says so, when all of them have written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from zgraph.engine.checkpoint.files import Written, write_parts
from zgraph.engine.checkpoint.index import Index, index_of
from zgraph.engine.checkpoint.ranks import Ranks
from zgraph.engine.checkpoint.shards import Gather, finish_shards
from zgraph.engine.checkpoint.staging import Pipe, Staging
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


class Background:
    """Writes checkpoints of an engine in a thread.

    Args:
        ranks: those of the engine.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.staging = ranks, Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, tensors: Tensors, writer: Writer, limit_bytes: int) -> None:
        """Take a snapshot of the tensors, and begin to write it. All ranks call it, when nothing else is written.

        Args:
            tensors: they may change when this returns.
            writer: of the files.
            limit_bytes: how much of the host's memory is taken. What is more waits until files have taken it.
        """
        gather, pipe = self.ranks.aside(), Pipe(self.staging)
        index: Index | None = None
        mine: Tensors = {}
        files: Mapping[Path, list[str]] = {}
        problem = ""
        try:
            index = index_of(tensors, self.ranks.members)
            mine = writer.mine(index, tensors)
            files = writer.files(mine)
        except (RuntimeError, ZgraphError) as error:
            problem = _said(error)
        self.staging.allow(limit_bytes, is_pinned=any(tensor.is_cuda for tensor in mine.values()))
        later = replace(writer, doom=lambda: None)  # what is torn is told when the snapshot is taken
        self._writing = self._thread.submit(_write, index, files, later, pipe, gather)
        _WRITING.add(self._writing)
        self._writing.add_done_callback(_WRITING.discard)
        try:
            if not problem:
                problem = "it was interrupted"
                pipe.fill(files, mine)
                problem = _said(doom) if (doom := writer.doom()) is not None else ""
        except (RuntimeError, MemoryError, ZgraphError) as error:
            problem = _said(error)
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


def _write(index: Index | None, files: Mapping[Path, list[str]], writer: Writer, pipe: Pipe, gather: Gather) -> None:
    """Write what comes through a pipe, and complete the checkpoint with the threads of the other ranks."""

    def write_file(path: Path) -> Written:
        with closing(pipe.parts()) as parts:
            return write_parts(path, parts)

    def write() -> Index:
        try:
            writer.write_all(files, write_file)
        finally:
            pipe.finish()
        if index is None:
            raise CheckpointError("it has no index")
        return index

    try:
        finish_shards(write, writer, gather)
    except ZgraphError as error:
        log.error("%s", error)
        if writer.rank == 0:
            shutil.rmtree(writer.folder, ignore_errors=True)
        raise


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
