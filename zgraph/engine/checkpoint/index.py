"""Index of a checkpoint: of each tensor how it is cut. It grows with the tensors, not with the ranks.

Every rank computes the same index from the placements of its tensors, and from that what it writes itself. What a rank
has written, with sizes and checksums, is in a file of its own, `rank_R_files.json`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, RootModel, ValidationError
from torch.distributed.tensor import DTensor, Replicate

from zgraph.bridge.private_dtensor import blocks_of
from zgraph.engine.checkpoint.checksums import NUM_THREADS, check_file
from zgraph.engine.checkpoint.directory import read_text
from zgraph.engine.checkpoint.files import (
    DTYPES,
    AnyName,
    Checksum,
    Written,
    checked_json,
    opened,
    read_json,
    torch_dtype,
)
from zgraph.engine.checkpoint.layout import Layout, Spans, checked_ranks, copies_to_write, sizes_of
from zgraph.engine.checkpoint.older import OldIndex
from zgraph.errors import CheckpointError

VERSION = 3
"""Of the format, the last that is read."""
MOST_RANKS = 1 << 20
"""Of one checkpoint. A file that says more is not believed."""


class Entry(BaseModel):
    """A tensor of a checkpoint.

    Args:
        dtype, shape: of the whole.
        layout: the number of its layout.
        copy_written: which of all copies of a part is in the files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    layout: NonNegativeInt
    copy_written: NonNegativeInt = 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return torch_dtype(self.dtype)


class Index(BaseModel):
    """Index of a checkpoint.

    Args:
        num_ranks: that wrote it.
        layouts: each once.
        tensors: by their names.
        checksum: of the index, as it is without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["zgraph checkpoint"] = "zgraph checkpoint"
    version: Literal[3] = 3
    num_ranks: Annotated[PositiveInt, Field(le=MOST_RANKS)]
    layouts: tuple[Layout, ...]
    tensors: dict[str, Entry]
    checksum: Checksum | None = None

    def computed(self) -> int:
        """The checksum that the index must have."""
        return zlib.crc32(self.model_dump_json(exclude={"checksum"}).encode())

    def problem(self) -> str:
        """Problem of the index, in words; empty if it has none."""
        if self.checksum != self.computed():
            return "its checksum is another"
        for name, entry in self.tensors.items():
            layout = self.layouts[entry.layout] if entry.layout < len(self.layouts) else None
            if entry.torch_dtype is None or layout is None or not layout.fits(entry.shape, self.num_ranks):
                return f"it does not say how {name} is cut"
            if entry.copy_written >= layout.num_copies:
                return f"{name} has no copy {entry.copy_written}"
        return ""

    def written_by(self, rank: int) -> dict[str, Spans]:
        """Parts that a rank writes, by name."""
        found: dict[str, Spans] = {}
        for name, entry in self.tensors.items():
            layout = self.layouts[entry.layout]
            if layout.writes(entry.shape, entry.copy_written, rank):
                found[name] = layout.spans(entry.shape, rank)
        return found

    def bytes_of(self, rank: int) -> int:
        """Bytes of the tensors that a rank writes."""
        found = 0
        for name, spans in self.written_by(rank).items():
            dtype = self.tensors[name].torch_dtype
            found += math.prod(sizes_of(spans)) * (dtype.itemsize if dtype is not None else 0)
        return found

    def parts(self, homes: Homes, name: str, wanted: Spans) -> Iterator[tuple[str, Spans]]:
        """The files that have something of what is wanted of a tensor, and what each has. Raises CheckpointError."""
        entry = self.tensors[name]
        for rank, spans in self.layouts[entry.layout].parts(entry.shape, entry.copy_written, wanted):
            yield homes.file(rank, name), spans

    def check(self, folder: Path, rank: int, num_ranks: int) -> None:
        """Check the bytes of a rank's share of the files. Raises CheckpointError."""
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            for _ in threads.map(lambda of: self.check_rank(folder, of), range(rank, self.num_ranks, num_ranks)):
                pass

    def check_rank(self, folder: Path, rank: int) -> None:
        """Check all that a rank has written: the bytes, and that these are the parts that the index says. Raises
        CheckpointError.
        """
        files, expected = files_of(folder, rank), self.written_by(rank)
        for file, held in files.files.items():
            path = folder / file
            check_file(path, held.num_bytes, held.checksum)
            if not held.names:
                continue
            with opened(path) as found:
                for name in held.names:
                    part, spans = found.get_slice(name), expected.pop(name, None)
                    is_it = spans is not None and tuple(part.get_shape()) == sizes_of(spans)
                    if not is_it or DTYPES.get(part.get_dtype()) != self.tensors[name].torch_dtype:
                        raise CheckpointError(f"{path} is damaged: its {name} is not the one that the index describes")
        if expected:
            raise CheckpointError(f"{folder / files_name(rank)} is damaged: it has no {min(expected)}")


class _Versioned(BaseModel):
    """Fields that an index of any version has, also of a later one."""

    format: Literal["zgraph checkpoint"]
    version: Annotated[int, Field(strict=True)]


class AnyIndex(RootModel[Annotated[Index | OldIndex, Field(discriminator="version")]]):
    """Index of any version."""

    @classmethod
    def read(cls, path: Path) -> Index | OldIndex:
        """The index in a file.

        Raises:
            CheckpointError: it cannot be read, holds something else, or is of a later version than this zgraph reads.
        """
        text = read_text(path)
        try:
            version = _Versioned.model_validate_json(text).version
        except ValidationError:
            version = VERSION  # whatever it is, the error says more
        if version > VERSION:
            raise CheckpointError(
                f"{path} is of version {version} of the format, and this zgraph reads up to {VERSION}: update zgraph"
            )
        return checked_json(path, text, cls).root


class OneFile(BaseModel):
    """A file that a rank has written, and the tensors of which it has a part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bytes: NonNegativeInt
    checksum: Checksum
    names: tuple[str, ...] = ()


class RankFiles(BaseModel):
    """All that a rank has written, with a checksum of this."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[AnyName, OneFile]
    checksum: Checksum | None = None

    @classmethod
    def of(cls, written: Sequence[tuple[Written, Sequence[str]]]) -> RankFiles:
        """The description of these files and of the tensors in them."""
        found = {
            w.file: OneFile(num_bytes=w.num_bytes, checksum=w.checksum, names=tuple(names)) for w, names in written
        }
        made = cls(files=found)
        return made.model_copy(update={"checksum": made.computed()})

    def computed(self) -> int:
        """The checksum that it must have."""
        return zlib.crc32(self.model_dump_json(exclude={"checksum"}).encode())


def files_name(rank: int) -> str:
    """The name of the file that says what a rank has written."""
    return f"rank_{rank}_files.json"


def files_of(folder: Path, rank: int) -> RankFiles:
    """Description of the files of a rank. Raises CheckpointError if that cannot be read, or is damaged."""
    path = folder / files_name(rank)
    found = read_json(path, RankFiles)
    if found.checksum != found.computed():
        raise CheckpointError(f"{path} is damaged: its checksum is another; load another checkpoint")
    return found


class Homes:
    """Which file has a rank's part of a tensor. What a rank has written is read once, when it is first asked for.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, dict[str, str]] = {}

    def file(self, rank: int, name: str) -> str:
        """The file's name. Raises CheckpointError if the rank has not written it."""
        if rank not in self._files:
            found = files_of(self.folder, rank).files
            self._files[rank] = {name: file for file, held in found.items() for name in held.names}
        if name not in self._files[rank]:
            raise CheckpointError(f"{self.folder / files_name(rank)} is damaged: it has no {name}")
        return self._files[rank][name]


def index_of(tensors: Mapping[str, torch.Tensor], members: Sequence[int]) -> Index:
    """The index of a checkpoint of these tensors, which is the same on all ranks.

    Args:
        tensors: each a DTensor over all members, or the same on each of them.
        members: the ranks of the checkpoint.

    Raises:
        CheckpointError: a checkpoint cannot hold one of these.
    """
    layouts: dict[Layout, int] = {}
    known: dict[Any, Layout] = {}
    entries: dict[str, tuple[Layout, torch.Tensor]] = {}
    whole = Layout(mesh=(len(members),), cuts=(None,))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"a tensor of {tensor.dtype} is not saved: keep it as one of {', '.join(DTYPES)}")
        layout = whole
        if isinstance(tensor, DTensor):
            key = tensor.device_mesh, tensor.placements
            layout = known[key] if key in known else layout_of(tensor, members)
            known[key] = layout
        if not layout.fits(tensor.shape, len(members)):
            raise CheckpointError(
                f"{name} of shape {tuple(tensor.shape)} is not saved: what a rank has of a dim is no multiple of the "
                "blocks in which the next axis cuts it; shard it plainly, or by sizes that divide"
            )
        entries[name] = layout, tensor
        layouts.setdefault(layout, len(layouts))
    copies = copies_to_write({n: (at, t.numel() * t.itemsize // _num_parts(at)) for n, (at, t) in entries.items()})
    made = Index(
        num_ranks=len(members),
        layouts=tuple(layouts),
        tensors={
            name: Entry(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                layout=layouts[layout],
                copy_written=copies[name],
            )
            for name, (layout, tensor) in entries.items()
        },
    )
    return made.model_copy(update={"checksum": made.computed()})


def _num_parts(layout: Layout) -> int:
    return layout.num_ranks // layout.num_copies


def layout_of(tensor: DTensor, members: Sequence[int]) -> Layout:
    """How a DTensor is cut. Raises CheckpointError if a part of it is yet to be summed."""
    mesh = tensor.device_mesh
    cuts = tuple(blocks_of(placement) for placement in tensor.placements)
    for placement, cut in zip(tensor.placements, cuts, strict=True):
        if cut is None and not isinstance(placement, Replicate):
            raise CheckpointError(f"a DTensor with placement {placement} is not saved: reduce it first")
    return Layout(mesh=tuple(mesh.shape), cuts=cuts, ranks=checked_ranks(mesh.mesh.flatten().tolist(), members))
