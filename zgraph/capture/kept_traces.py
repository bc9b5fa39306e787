"""Traces that are kept: what AOTAutograd has made of a graph of torch.compile, and the graph that was imported from it.

torch.compile captures the model's code in each run, and asks its guards in each call. The rest of a capture follows
from its graph: AOTAutograd's trace of forward and backward, and the import. A kept trace has the imported graph as text
and AOTAutograd's result, in which the two halves of the program are blank.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.bridge.aten import FROM_TORCH, TO_TORCH
from zgraph.bridge.private_traces import is_data
from zgraph.errors import RunFileError, ZirError
from zgraph.ir import DType, Graph, Plan, parse_graph, print_graph

_HEAD = b"zgraph trace 1\n"

MAX_BYTES = 256 << 20
"""Of a trace; one of 80 layers has some 10 MB."""

MAX_CONSTANT_BYTES = 1 << 16


class Traces(Protocol):
    """Where traces are kept."""

    def salt(self) -> str | None:
        """Text of all that the compiler of captured graphs depends on; None where no trace is kept."""

    def find(self, key: str) -> bytes | None:
        """Bytes that are kept for a key."""

    def keep(self, key: str, held: bytes) -> None:
        """Keep a trace."""

    def refuse(self, key: str, why: str) -> None:
        """Remove what is kept for a key."""

    def count(self, *, found: bool) -> None:
        """Take note of a trace: whether it was found."""


class _Constant(BaseModel):
    """A small tensor of the processor that the model's code makes: its bytes in base64, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: DType
    shape: tuple[int, ...] = Field(max_length=64)
    data: str = Field(max_length=2 * MAX_CONSTANT_BYTES)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Constant:
        """The record of a tensor."""
        held = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data = base64.b64encode(held).decode()
        return cls(dtype=FROM_TORCH[tensor.dtype], shape=tuple(tensor.shape), data=data)

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor. Raises ValueError or RuntimeError if it has other bytes than its shape says."""
        held = bytearray(base64.b64decode(self.data, validate=True))
        dtype = TO_TORCH[self.dtype]
        return (torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)).reshape(self.shape)


class _Head(BaseModel):
    """All of a kept trace but AOTAutograd's result.

    Args:
        captured: the imported graph.
        constants: of it, by name.
        saved: the values that the forward saves for the backward, by which the result counts its arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    captured: str
    constants: dict[str, _Constant] = Field(max_length=10_000)
    saved: tuple[str, ...] = Field(max_length=1_000_000)


@dataclass(frozen=True)
class Trace:
    """A trace.

    Args:
        captured: the imported graph.
        constants: of it, by name.
        saved: see `saved_by`.
        result: AOTAutograd's, as `zgraph.bridge.private_traces` has it.
    """

    captured: Graph
    constants: Mapping[str, torch.Tensor]
    saved: tuple[str, ...]
    result: bytes

    def to_bytes(self) -> bytes:
        """The trace as a file has it."""
        constants = {name: _Constant.of(tensor) for name, tensor in self.constants.items()}
        record = _Head(captured=print_graph(self.captured), constants=constants, saved=self.saved)
        head = record.model_dump_json().encode()
        return _HEAD + zlib.compress(str(len(head)).encode() + b"\n" + head + self.result, 6)


def is_small(constants: Mapping[str, torch.Tensor]) -> bool:
    """Whether constants are plain tensors of the processor that a trace can hold."""
    return all(
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype in FROM_TORCH
        and tensor.nbytes <= MAX_CONSTANT_BYTES
        for tensor in constants.values()
    )


def saved_by(plan: Plan) -> tuple[str, ...]:
    """Names and types of what a plan's forward saves for its backward, in order."""
    return tuple(f"{value.name}: {value.type}" for value in plan.saved)


def read_trace(held: bytes) -> Trace:
    """Read what `Trace.to_bytes` has written.

    Raises:
        RunFileError: it is none, or holds what is no data.
    """
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(held.removeprefix(_HEAD), MAX_BYTES)
    except zlib.error:
        text = b""
    size, _, rest = text.partition(b"\n")
    if not held.startswith(_HEAD) or not unpacking.eof or not size.isdigit() or len(size) > 12:
        raise RunFileError("it is no kept trace")
    try:
        head = _Head.model_validate_json(rest[: int(size)])
        captured = parse_graph(head.captured)
        constants = {name: constant.tensor for name, constant in head.constants.items()}
    except (ValidationError, ZirError, ValueError, RuntimeError) as error:
        raise RunFileError(f"its graph cannot be read: {type(error).__name__}") from None
    result = rest[int(size) :]
    if not is_data(result):
        raise RunFileError("it holds something else than a result of AOTAutograd")
    return Trace(captured, constants, head.saved, result)
