"""Storage for torch.distributed.checkpoint without pickle: tensors in safetensors files, what lies where in JSON.

Each rank writes the shards it holds into its own files. `index.json` says of each tensor, by its name, which parts
of it lie in which files, so that another number of ranks can read what it needs of each, and has a checksum of every
file, and one of its own.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from zgraph.engine.checkpoint.checksums import check_files, checksum, is_tiled
from zgraph.engine.checkpoint.directory import read_text, sync, write_text
from zgraph.errors import CheckpointError, ZgraphError
from zgraph.runtime.shards import settle_host_memory

log = logging.getLogger("zgraph")

INDEX = "index.json"

M = TypeVar("M", bound=BaseModel)

MAX_FILE_BYTES = 1 << 30
"""Of the tensors that are on the host at once, and in one file, unless one alone is larger."""

FileName = Annotated[str, Field(pattern=r"^rank_\d+_\d+\.safetensors$")]
AnyName = Annotated[str, Field(pattern=r"^[a-z0-9_]+\.(safetensors|json)$")]
Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]


class Written(NamedTuple):
    """A file that a rank has written, with its size and checksum."""

    file: str
    num_bytes: int
    checksum: int

    @classmethod
    def of(cls, path: Path) -> Written:
        return cls(path.name, path.stat().st_size, checksum(path))


class Chunk(BaseModel):
    """A part of a tensor: where it begins, its shape, and the file that has it under the tensor's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offsets: tuple[NonNegativeInt, ...]
    sizes: tuple[NonNegativeInt, ...]
    file: FileName


class Stored(BaseModel):
    """A tensor and its parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return next((dtype for dtype in _DTYPES.values() if str(dtype) == f"torch.{self.dtype}"), None)

    def is_whole(self) -> bool:
        """Whether the parts cover the tensor, with no gap and nothing twice."""
        return is_tiled(self.shape, [(chunk.offsets, chunk.sizes) for chunk in self.chunks])


class Index(BaseModel):
    """Index of a checkpoint: its tensors, and the bytes of its files.

    Args:
        version: 1 had no checksums.
        checksums: of all files but this one.
        checksum: of this one, as it is without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["zgraph checkpoint"] = "zgraph checkpoint"
    version: Literal[1, 2] = 2
    tensors: dict[str, Stored]
    files: dict[FileName, NonNegativeInt]
    checksums: dict[AnyName, Checksum] = {}
    checksum: Checksum | None = None

    def computed(self) -> int:
        """The checksum that the index must have."""
        return zlib.crc32(self.model_dump_json(exclude={"checksum"}).encode())


class Writer(StorageWriter):
    """Writes a rank's shards; the coordinator writes the index when all ranks have written theirs.

    Args:
        folder: where to.
        rank: whose shards.
        beside: what this rank writes with its shards.
        complete: called by the coordinator at the end, when everything is on disk.
        doom: asked when all shards have been read: why they may be torn; None where they are whole.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        beside: Mapping[str, str],
        complete: Callable[[], None],
        doom: Callable[[], ZgraphError | None],
    ) -> None:
        self.folder, self.rank, self.beside, self.complete, self.doom = folder, rank, beside, complete, doom

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        indices = {item.index.fqn: item.index for item in plan.items}
        tensors = {item.index.fqn: _tensor(planner.resolve_data(item)) for item in plan.items}
        results = []
        try:
            for number, names in enumerate(in_files({n: t.nbytes for n, t in tensors.items()}, MAX_FILE_BYTES)):
                file = self.folder / f"rank_{self.rank}_{number}.safetensors"
                write_tensors(file, {name: tensors[name].cpu().contiguous() for name in names})
                held = Written.of(file)
                results += [WriteResult(indices[name], tensors[name].nbytes, held) for name in names]
            if (doom := self.doom()) is not None:
                raise doom
            for name, text in self.beside.items():
                write_text(self.folder / name, text)
                held = Written.of(self.folder / name)
                results.append(WriteResult(MetadataIndex(f"file {name}"), held.num_bytes, held))
            sync(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder.parent} cannot be written to: {error}") from None
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        homes: dict[MetadataIndex, Written] = {r.index: r.storage_data for some in results for r in some}
        tensors = {name: _stored(name, found, homes) for name, found in metadata.state_dict_metadata.items()}
        files = {w.file: w.num_bytes for w in homes.values() if w.file.endswith(".safetensors")}
        index = Index(tensors=tensors, files=files, checksums={w.file: w.checksum for w in homes.values()})
        index = index.model_copy(update={"checksum": index.computed()})
        write_text(self.folder / INDEX, index.model_dump_json())
        self.complete()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


class Reader(StorageReader):
    """Reads what a rank needs. Everything but the numbers themselves is checked when it is made; `check` does those.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX, Index)
        if self.index.version > 1 and self.index.checksum != self.index.computed():
            raise CheckpointError(f"{folder / INDEX} is damaged: its checksum is another; load another checkpoint")
        for name, tensor in self.index.tensors.items():
            if tensor.torch_dtype is None or not tensor.is_whole():
                raise CheckpointError(f"{folder / INDEX} is damaged: the parts of {name} do not make a tensor")
        self._check_files()

    def check(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Check the bytes of a rank's share of the files, before anything is loaded of them.

        Raises:
            CheckpointError: one is not what was written.
        """
        if self.index.version == 1:
            if rank == 0:
                log.warning("%s has no checksums: whether its files are damaged cannot be checked", self.folder)
            return
        if missing := self.index.files.keys() - self.index.checksums.keys():
            raise CheckpointError(f"{self.folder / INDEX} is damaged: it has no checksum of {min(missing)}")
        check_files(self.folder, self.index.checksums, rank, num_ranks)

    def _check_files(self) -> None:
        parts: dict[str, list[tuple[str, Stored, Chunk]]] = defaultdict(list)
        for name, tensor in self.index.tensors.items():
            for chunk in tensor.chunks:
                parts[chunk.file].append((name, tensor, chunk))
        for file, held in parts.items():
            path = self.folder / file
            with opened(path) as found:
                if path.stat().st_size != self.index.files.get(file):
                    raise CheckpointError(f"{path} is damaged: it has another size than it was written with")
                for name, tensor, chunk in held:
                    part = found.get_slice(name)
                    if tuple(part.get_shape()) != chunk.sizes or _DTYPES.get(part.get_dtype()) != tensor.torch_dtype:
                        raise CheckpointError(f"{path} is damaged: its {name} is not the one that the index describes")

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _described(tensor) for name, tensor in self.index.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if math.prod(item.lengths):
                items[self._file(item.storage_index)].append(item)
        settle_host_memory()
        for file, wanted in items.items():
            with opened(self.folder / file) as found:
                for item in wanted:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(found, item))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor."""
        return {name: (t.torch_dtype, t.shape) for name, t in self.index.tensors.items() if t.torch_dtype is not None}

    def whole(self, name: str) -> torch.Tensor:
        """A tensor, put together of its parts."""
        stored = self.index.tensors[name]
        made = torch.empty(stored.shape, dtype=stored.torch_dtype)
        for chunk in stored.chunks:
            with opened(self.folder / chunk.file) as found:
                place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
                made[place] = found.get_tensor(name)
        return made

    def _file(self, index: MetadataIndex) -> str:
        chunks = self.index.tensors[index.fqn].chunks
        return next(c.file for c in chunks if index.offset is None or c.offsets == tuple(index.offset))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


# --- files -----------------------------------------------------------------------------------------------------------


def in_files(num_bytes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names of tensors, as many at once as go into a file of so many bytes, and at least one."""
    names: list[str] = []
    filled = 0
    for name, size in num_bytes.items():
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, and wait until it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets its owner alone read it
    sync(path)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it while it is open is a CheckpointError."""
    try:
        file: Any = safe_open(path, framework="pt")
        with file as found:
            yield found
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read, or is damaged: {error}") from None


def read_json(path: Path, kind: type[M]) -> M:
    """A JSON file, checked.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        return kind.model_validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {where + ': ' if where else ''}{first['msg']}") from None


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def _tensor(data: Any) -> torch.Tensor:
    assert isinstance(data, torch.Tensor)  # everything else is in the files beside
    if data.dtype not in _DTYPES.values():
        raise CheckpointError(f"a tensor of {data.dtype} is not saved: keep it as one of {', '.join(_DTYPES)}")
    return data.detach()


def _part(found: Any, item: ReadItem) -> torch.Tensor:
    name = item.storage_index.fqn
    if not item.lengths:
        return found.get_tensor(name)  # type: ignore[no-any-return]
    place = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
    return found.get_slice(name)[place]  # type: ignore[no-any-return]


def _stored(name: str, found: Any, homes: Mapping[MetadataIndex, Written]) -> Stored:
    chunks = tuple(
        Chunk(offsets=tuple(c.offsets), sizes=tuple(c.sizes), file=homes[MetadataIndex(name, c.offsets)].file)
        for c in found.chunks
        if math.prod(c.sizes) or not math.prod(found.size)
    )
    return Stored(dtype=str(found.properties.dtype).removeprefix("torch."), shape=tuple(found.size), chunks=chunks)


def _described(tensor: Stored) -> TensorStorageMetadata:
    assert tensor.torch_dtype is not None
    chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.torch_dtype), torch.Size(tensor.shape), chunks)
