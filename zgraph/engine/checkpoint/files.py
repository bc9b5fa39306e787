"""Files of a checkpoint: tensors in safetensors files, written with their checksums, and JSON that is checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from zgraph.engine.checkpoint.checksums import CHUNK_BYTES, checksum
from zgraph.engine.checkpoint.direct import DirectFile
from zgraph.engine.checkpoint.directory import check_plain, read_text, write_text
from zgraph.errors import CheckpointError

M = TypeVar("M", bound=BaseModel)

MAX_FILE_BYTES = 1 << 30
"""Of the tensors that are on the host at once, and in one file, unless one alone is larger."""

FileName = Annotated[str, Field(pattern=r"^rank_\d+_\d+\.safetensors$")]
AnyName = Annotated[str, Field(pattern=r"^[a-z0-9_]+\.(safetensors|json)$")]
Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]

DTYPES = {
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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Written(NamedTuple):
    """A file that a rank has written, with its size and checksum."""

    file: str
    num_bytes: int
    checksum: int


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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Write a safetensors file, and wait until it is on disk. Its checksum is made meanwhile, of what is written.

    Args:
        path: where to.
        tensors: on the host. They lie in the file by falling size of their numbers, so that each is aligned.

    Raises:
        OSError: it cannot be written.
    """
    return write_parts(path, _parts(in_order(tensors)))


def write_parts(path: Path, parts: Iterable[memoryview]) -> Written:
    """Write a file of these parts, one after the other, and wait until it is on disk.

    Args:
        path: where to.
        parts: each is read until the next is asked for.

    Raises:
        OSError: it cannot be written.
    """
    with DirectFile(path) as file, ThreadPoolExecutor(1, "checksum") as thread:
        found, num_bytes = 0, 0
        for part in parts:
            summed = _summed(thread, part, found)
            try:
                num_bytes += file.write(part)
            finally:
                found = summed()
        file.finish()
    return Written(path.name, num_bytes, found)


def _summed(thread: ThreadPoolExecutor, part: memoryview, found: int) -> Callable[[], int]:
    """A function that gives the checksum when it is made."""
    try:
        return thread.submit(zlib.crc32, part, found).result
    except RuntimeError:  # the interpreter ends: files that are written to their end then are summed by who writes
        return lambda: zlib.crc32(part, found)


def in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they lie in a file: by falling size of their numbers."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def header_of(ordered: Mapping[str, torch.Tensor]) -> bytes:
    """The beginning of a safetensors file of these tensors.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, where it is: its own memory, if that is dense."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _parts(ordered: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header_of(ordered))
    for tensor in ordered.values():
        if tensor.numel():
            numbers: Any = bytes_of(tensor).numpy()
            whole = memoryview(numbers)
            for start in range(0, len(whole), CHUNK_BYTES):
                yield whole[start : start + CHUNK_BYTES]


def write_beside(path: Path, text: str) -> Written:
    """Write a file that is no tensors, and wait until it is on disk."""
    write_text(path, text)
    return Written(path.name, path.stat().st_size, checksum(path))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever is wrong with it while it is open is a CheckpointError."""
    try:
        check_plain(path)
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
    return checked_json(path, read_text(path), kind)


def checked_json(path: Path, text: str, kind: type[M]) -> M:
    """Object that the text of a JSON file has. Raises CheckpointError if that is something else."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {where + ': ' if where else ''}{first['msg']}") from None


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype of this name that a checkpoint can hold; None of any other."""
    return next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{name}"), None)
