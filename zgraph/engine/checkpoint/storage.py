"""Tensors of all ranks in a folder: safetensors of each rank, what each has written, and one index in JSON.

Nobody gathers what lies where: each rank computes that from how the tensors are cut (`layout.py`), and writes its own
files. Another number of ranks reads what it needs of each. No pickle is written or read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from zgraph.bridge.private_blocks import local_spans
from zgraph.engine.checkpoint.checksums import NUM_THREADS
from zgraph.engine.checkpoint.directory import sync, write_text
from zgraph.engine.checkpoint.files import (
    MAX_FILE_BYTES,
    Written,
    in_files,
    opened,
    write_beside,
    write_tensors,
)
from zgraph.engine.checkpoint.index import AnyIndex, Homes, Index, RankFiles, files_name
from zgraph.engine.checkpoint.layout import Piece, Spans, pieces
from zgraph.errors import CheckpointError, ZgraphError
from zgraph.optim.runs import local
from zgraph.runtime.shards import settle_host_memory

INDEX = "index.json"


@dataclass(frozen=True)
class Writer:
    """Writes a rank's files; the first rank writes the index when all have written theirs.

    Args:
        folder: where to.
        rank: whose.
        beside: what this rank writes with its tensors.
        complete: called by the first rank at the end, when everything is on disk.
        doom: asked when all tensors have been read: why they may be torn; None where they are whole.
    """

    folder: Path
    rank: int
    beside: Mapping[str, str]
    complete: Callable[[], None]
    doom: Callable[[], ZgraphError | None]

    def write(self, index: Index, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write this rank's files.

        Raises:
            CheckpointError: the folder cannot be written to.
            ZgraphError: the tensors may be torn.
        """
        mine = self.mine(index, tensors)
        files = self.files(mine)
        self.write_all(files, lambda path: write_tensors(path, {n: mine[n].cpu() for n in files[path]}))

    def mine(self, index: Index, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Memory of what this rank writes."""
        return {name: local(tensors[name]) for name in index.written_by(self.rank)}

    def files(self, mine: Mapping[str, torch.Tensor]) -> dict[Path, list[str]]:
        """Files of this rank, and which of its tensors each has."""
        groups = in_files({name: tensor.nbytes for name, tensor in mine.items()}, MAX_FILE_BYTES)
        return {self.folder / f"rank_{self.rank}_{number}.safetensors": names for number, names in enumerate(groups)}

    def write_all(self, files: Mapping[Path, list[str]], write: Callable[[Path], Written]) -> None:
        """Write this rank's files, what lies beside them, and what they are.

        Args:
            files: and the names of the tensors in each.
            write: writes one of them.

        Raises:
            CheckpointError: the folder cannot be written to.
            ZgraphError: the tensors may be torn.
        """
        try:
            written: list[tuple[Written, list[str]]] = [(write(path), names) for path, names in files.items()]
            if (doom := self.doom()) is not None:
                raise doom
            written += [(write_beside(self.folder / name, text), []) for name, text in self.beside.items()]
            write_text(self.folder / files_name(self.rank), RankFiles.of(written).model_dump_json())
            sync(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder.parent} cannot be written to: {error}") from None

    def finish(self, index: Index) -> None:
        """Write the index: from then on, the checkpoint is there. Raises OSError."""
        write_text(self.folder / INDEX, index.model_dump_json())
        self.complete()


class Reader:
    """Reads what a rank needs of a checkpoint of any version. `check` looks at the bytes, before anything is loaded.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: its index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = AnyIndex.read(folder / INDEX)
        if problem := self.index.problem():
            raise CheckpointError(f"{folder / INDEX} is damaged: {problem}; load another checkpoint")
        self._homes = Homes(folder)

    def check(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Check the bytes of a rank's share of the files; the ranks together check all.

        Raises:
            CheckpointError: one is not what was written.
        """
        self.index.check(self.folder, rank, num_ranks)

    def close(self) -> None:
        """Let go of what was opened, or made to read."""

    def beside(self, file: str, rank: int) -> Path:
        """The path of a file that a rank has written beside its tensors."""
        return self.folder / file

    @property
    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {name: (t.torch_dtype, t.shape) for name, t in self.index.tensors.items() if t.torch_dtype is not None}

    @torch.no_grad()
    def fill(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Read what this rank has of these tensors, from several files at a time.

        Raises:
            CheckpointError: a tensor is missing, or of another shape; a file cannot be read.
        """
        settle_host_memory()
        wanted: dict[str, list[tuple[str, torch.Tensor, Piece]]] = defaultdict(list)
        for name, tensor in targets.items():
            stored = self.index.tensors.get(name)
            if stored is None or stored.shape != tuple(tensor.shape):
                has = f"it is of shape {stored.shape}" if stored is not None else "it is not there"
                raise CheckpointError(f"{self.folder} has no {name} of shape {tuple(tensor.shape)}: {has}")
            for file, piece in self._pieces(name, spans_of(tensor)):
                wanted[file].append((name, local(tensor), piece))

        def read(file: str) -> None:
            with opened(self.folder / file) as found:
                for name, target, piece in wanted[file]:
                    if piece.wanted:
                        target[piece.wanted].copy_(found.get_slice(name)[piece.stored])
                    else:
                        target.copy_(found.get_tensor(name))

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            for _ in threads.map(read, sorted(wanted)):
                pass

    def whole(self, name: str) -> torch.Tensor:
        """A tensor, put together of its parts."""
        stored = self.index.tensors[name]
        made = torch.empty(stored.shape, dtype=stored.torch_dtype)
        self.fill({name: made})
        return made

    def _pieces(self, name: str, spans: Spans) -> list[tuple[str, Piece]]:
        """Files and places in them to read for a part of a tensor."""
        found = self.index.parts(self._homes, name, spans)
        return [(file, piece) for file, stored in found for piece in pieces(stored, spans)]


def spans_of(tensor: torch.Tensor) -> Spans:
    """For each dim the runs of indices that this rank has."""
    return local_spans(tensor) if isinstance(tensor, DTensor) else [[(0, size)] for size in tensor.shape]
