"""Copies of parameters that all ranks still have from the last gather, for codes of what changed since.

A copy lies as it was gathered, bucket by bucket: a row of each rank's part. Another graph of the same model may have
other buckets: copies move there with their parameters. Each has a number, the same on all ranks, which codes name: a
rank that has another copy finds out. One that somebody has written to is forgotten, and numbers are sent as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zgraph.bridge.aten import FROM_TORCH
from zgraph.ir import DType, TensorType
from zgraph.ir.layout import bucket_layout, chunk_numel


@dataclass(eq=False)
class Copy:
    """A bucket's parameters as all ranks have them.

    Args:
        names: of the parameters, in order.
        dtype: of the numbers.
        rows: [ranks, numbers of a part].
        number: the same on all ranks; grows with each copy.
        version: of the memory, when it was written.
        own: this rank's part, as it was coded; None where the copy has it exactly.
    """

    names: tuple[str, ...]
    dtype: DType
    rows: torch.Tensor
    number: int
    version: int
    own: torch.Tensor | None = None

    @property
    def is_intact(self) -> bool:
        """Whether nobody has written to it since."""
        return self.rows._version == self.version


class Owner(Protocol):
    """The session of the model, as far as it is needed here."""

    store: Any
    num_shards: int


class LastCopies:
    """The copies of one model on this rank. There are none before the first gather.

    Args:
        session: of the model.

    Attributes:
        number_bytes: of this rank's parts that were coded so far, of parameters without copies, too.
        code_bytes: of their codes.
    """

    def __init__(self, session: Owner) -> None:
        self.session = session
        self._homes: dict[tuple[str, DType], Copy] = {}
        self._coded: dict[tuple[str, ...], tuple[Copy | None, torch.Tensor]] = {}
        self._count = 0
        self.number_bytes = self.code_bytes = 0

    def of(self, names: tuple[str, ...], dtype: DType) -> Copy | None:
        """The copy of these parameters; None if there is none of all of them."""
        homes = [self._homes.get((name, dtype)) for name in names]
        copies = [home for home in homes if home is not None and home.is_intact]
        if len(copies) < len(names):
            return None
        first = copies[0]
        if first.names == names and all(copy is first for copy in copies):
            return first
        layout = bucket_layout([self._kind(name, dtype) for name in names], self.session.num_shards)
        with torch.inference_mode(False):  # of what is made in it, nobody could tell whether it was written to
            rows = first.rows.new_zeros(self.session.num_shards, layout.part_numel)
        for name, copy, offset, chunk in zip(names, copies, layout.offsets, layout.chunks, strict=True):
            rows[:, offset : offset + chunk].copy_(self._member(copy, name))
        return self.keep(names, dtype, rows)

    def keep(self, names: tuple[str, ...], dtype: DType, rows: torch.Tensor, own: torch.Tensor | None = None) -> Copy:
        """Keep what was gathered, in the place of what was kept of these parameters.

        Args:
            names: of the parameters.
            dtype: of the numbers.
            rows: [ranks, numbers of a part].
            own: this rank's part, where the copy has it but about.
        """
        self._count += 1
        made = Copy(names, dtype, rows, self._count, rows._version, own)
        self._homes.update(((name, dtype), made) for name in names)
        return made

    def began(self, names: tuple[str, ...], before: Copy | None, own: torch.Tensor) -> None:
        """Note for the gather under way which copy codes change, and what this rank's part is."""
        self._coded[names] = before, own

    def ended(self, names: tuple[str, ...]) -> tuple[Copy | None, torch.Tensor]:
        """Take what `began` has noted."""
        return self._coded.pop(names)

    def forget(self) -> None:
        """Let go of all copies: the next gathers send numbers as they are."""
        self._homes.clear()
        self._coded.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies, and of this rank's parts as they were coded."""
        held = {id(copy): copy for copy in self._homes.values()}.values()
        return sum(copy.rows.nbytes + (0 if copy.own is None else copy.own.nbytes) for copy in held)

    def most_bytes(self, dtypes: Collection[DType], *, with_own: bool) -> int:
        """Bytes of the copies of all parameters that can have one: sharded, and not again for the backward.

        Args:
            dtypes: those whose numbers the codec codes.
            with_own: whether this rank's part is kept as it was coded, too.
        """
        found, count = 0, self.session.num_shards
        for slot in self.session.store.slots.values():
            stage = self.session.store.default_stage if slot.stage is None else slot.stage
            dtype = FROM_TORCH[slot.placeholder.dtype]
            if slot.is_sharded and stage in (1, 2) and dtype in dtypes:
                found += (count + with_own) * chunk_numel(tuple(slot.placeholder.shape), count) * dtype.itemsize
        return found

    def __str__(self) -> str:
        """Bytes coded so far, for people; empty if nothing was."""
        if not self.number_bytes:
            return ""
        share = self.code_bytes / self.number_bytes
        return f"{self.code_bytes:,} bytes for {self.number_bytes:,} of numbers, {share:.1%}"

    def _kind(self, name: str, dtype: DType) -> TensorType:
        return TensorType(dtype, tuple(self.session.store.slots[name].placeholder.shape))

    def _member(self, copy: Copy, name: str) -> torch.Tensor:
        layout = bucket_layout([self._kind(n, copy.dtype) for n in copy.names], self.session.num_shards)
        at = copy.names.index(name)
        return copy.rows[:, layout.offsets[at] : layout.offsets[at] + layout.chunks[at]]
