"""Reads a checkpoint whose files are copies on several hosts: what a rank asks for is brought to its host."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from zgraph.engine.checkpoint.checksums import check_file
from zgraph.engine.checkpoint.index import Homes, files_name, files_of
from zgraph.engine.checkpoint.memory.choice import Choice
from zgraph.engine.checkpoint.memory.links import Address, Client
from zgraph.engine.checkpoint.memory.shelf import Shelf
from zgraph.engine.checkpoint.storage import INDEX, Reader
from zgraph.errors import CheckpointError


class CopyReader(Reader):
    """Reads copies. They have been checked where they lie; what comes from another host is checked again here.

    Args:
        shelf: of this host.
        choice: the copies.
        near: the ranks whose copies are whole on this host.
        addresses: where each rank serves.
        rank: this one.

    Raises:
        CheckpointError: the index does not come, or is damaged.
    """

    def __init__(
        self, shelf: Shelf, choice: Choice, near: Collection[int], addresses: Sequence[Address], rank: int
    ) -> None:
        self._shelf, self._choice, self._near, self._addresses = shelf, choice, near, addresses
        self._made = shelf.folder / f".reading_{rank}.{secrets.token_hex(4)}"
        for left in shelf.folder.glob(f".reading_{rank}.*"):
            shutil.rmtree(left, ignore_errors=True)
        self._made.mkdir(mode=0o700)
        try:
            self._bring(min(choice.holders), INDEX, self._made)
            super().__init__(self._made)
            if self.index.checksum != choice.checksum:
                raise CheckpointError(f"{self._made / INDEX} is that of other copies")
        except BaseException:
            self.close()
            raise
        self._homes = _Brought(self)

    def check(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Nothing is left to check."""

    def beside(self, file: str, rank: int) -> Path:
        """The path of a file of a rank, brought here if it is elsewhere.

        Raises:
            CheckpointError: it does not come, or is damaged.
        """
        path = self.folder / file
        if not path.exists():
            self._bring(rank, file, self.folder)
            if file != files_name(rank):
                self.beside(files_name(rank), rank)
                held = files_of(self.folder, rank).files.get(file)
                if held is None:
                    raise CheckpointError(f"the copy of rank {rank} has no {file}")
                check_file(path, held.num_bytes, held.checksum)
        return path

    def _bring(self, rank: int, file: str, folder: Path) -> None:
        mark = self._choice.mark
        if rank in self._near:
            os.link(self._shelf.place(rank, mark) / file, folder / file, follow_symlinks=False)
            return
        with Client(self._addresses[self._choice.holders[rank]]) as client:
            if not client.fetch(rank, mark, file, folder / file, shutil.disk_usage(folder).free):
                raise CheckpointError(f"the copy of rank {rank} has no {file} any more")

    def close(self) -> None:
        """Remove what was brought."""
        shutil.rmtree(self._made, ignore_errors=True)


class _Brought(Homes):
    """Brings the files that are asked for."""

    def __init__(self, reader: CopyReader) -> None:
        super().__init__(reader.folder)
        self._reader = reader

    def file(self, rank: int, name: str) -> str:
        """The name of the file that has a rank's part of a tensor. Raises CheckpointError if it does not come."""
        self._reader.beside(files_name(rank), rank)
        file = super().file(rank, name)
        self._reader.beside(file, rank)
        return file
