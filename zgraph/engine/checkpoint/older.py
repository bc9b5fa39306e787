"""Checkpoints of versions 1 and 2, whose index lists every part of every tensor and the file that has it."""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from zgraph.engine.checkpoint.checksums import check_files, is_tiled
from zgraph.engine.checkpoint.files import DTYPES, AnyName, Checksum, FileName, opened, torch_dtype
from zgraph.engine.checkpoint.layout import Spans
from zgraph.errors import CheckpointError

log = logging.getLogger("zgraph")


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
        return torch_dtype(self.dtype)

    def is_whole(self) -> bool:
        """Whether the parts cover the tensor, with no gap and nothing twice."""
        return is_tiled(self.shape, [(chunk.offsets, chunk.sizes) for chunk in self.chunks])


class OldIndex(BaseModel):
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

    def problem(self) -> str:
        """Problem of the index, in words; empty if it has none."""
        if self.version > 1 and self.checksum != self.computed():
            return "its checksum is another"
        for name, tensor in self.tensors.items():
            if tensor.torch_dtype is None or not tensor.is_whole():
                return f"the parts of {name} do not make a tensor"
        return ""

    def parts(self, homes: object, name: str, wanted: Spans) -> Iterator[tuple[str, Spans]]:
        """The files that have something of a tensor, and what each has."""
        for chunk in self.tensors[name].chunks:
            yield chunk.file, [[run] for run in zip(chunk.offsets, chunk.sizes, strict=True)]

    def check(self, folder: Path, rank: int, num_ranks: int) -> None:
        """Check the bytes of a rank's share of the files. Raises CheckpointError."""
        self._check_parts(folder)
        if self.version == 1:
            if rank == 0:
                log.warning("%s has no checksums: whether its files are damaged cannot be checked", folder)
            return
        if missing := self.files.keys() - self.checksums.keys():
            raise CheckpointError(f"{folder} is damaged: its index has no checksum of {min(missing)}")
        check_files(folder, self.checksums, rank, num_ranks)

    def _check_parts(self, folder: Path) -> None:
        parts: dict[str, list[tuple[str, Stored, Chunk]]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                parts[chunk.file].append((name, tensor, chunk))
        for file, held in parts.items():
            path = folder / file
            with opened(path) as found:
                if path.stat().st_size != self.files.get(file):
                    raise CheckpointError(f"{path} is damaged: it has another size than it was written with")
                for name, tensor, chunk in held:
                    part = found.get_slice(name)
                    if tuple(part.get_shape()) != chunk.sizes or DTYPES.get(part.get_dtype()) != tensor.torch_dtype:
                        raise CheckpointError(f"{path} is damaged: its {name} is not the one that the index describes")
