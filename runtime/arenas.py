"""Memory in which programs lay out what collectives read and write: taken for each run, or there for good and known to
NCCL, which then moves data with fewer of the GPU's multiprocessors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from zgraph.bridge.private_arenas import RegisteredBlock, registered_block
from zgraph.ir import Plan


def most_bytes(plan: Plan) -> int:
    """Bytes of the largest arena among a plan's programs."""
    programs = (plan.forward, plan.backward, plan.unsynced, *(plan.loss_only or ()))
    return max((p.arena_bytes for p in programs if p is not None), default=0)


class Turns:
    """Streams that take turns with memory that stays: each comes after the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Have the current stream wait for the one before, if that is another."""
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream


class Arenas:
    """The arenas of one model's programs, of which one runs at a time.

    Args:
        device: of this rank.
        group: gives the ranks that hold the shards; None for one rank.
        kind: "registered" keeps one block that is registered with the group; "symmetric" one that is a window at the
            same place on all ranks too; "plain" takes memory for each run.

    `turns` are those of all programs with memory that stays. `room_bytes` is what a block that stays may take; None
    sets no limit. `state` says what became of it, in words.
    """

    def __init__(self, device: torch.device, group: Callable[[], dist.ProcessGroup | None], kind: str) -> None:
        self.device, self.kind = device, kind
        self.room_bytes: int | None = None
        self.state = ""
        self.turns = Turns(device)
        self._group = group
        self._block: torch.Tensor | None = None
        self._registered: list[RegisteredBlock] = []
        weakref.finalize(self, _released, self._registered).atexit = False

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay between runs: of all blocks, as a recording may hold an earlier one."""
        return sum(block.memory.nbytes for block in self._registered)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory for one run of a program, each at a multiple of `zgraph.ir.arena.ALIGN_BYTES`."""
        if self._block is None or self._block.nbytes < num_bytes:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self.turns.follow()
        return self._block[:num_bytes]

    def keep(self, num_bytes: int) -> torch.Tensor:
        """Memory that stays where it is, whatever becomes of the block."""
        if self._block is not None and self._block.nbytes >= num_bytes:
            return self._block[:num_bytes]
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def reserve(self, plan: Plan, *, together: bool) -> None:
        """Have a block that is large enough for a plan, registered if that can be.

        Args:
            plan: about to be linked.
            together: whether all ranks are here with the same plan.
        """
        num_bytes = most_bytes(plan)
        if self.device.type != "cuda" or not num_bytes:
            return
        if self._block is not None and num_bytes <= self._block.nbytes:
            return
        if problem := self._problem(num_bytes, together=together):
            self.state = self.state if self._block is not None else f"not registered: {problem}"
            return
        group = self._group()
        assert group is not None
        made = registered_block(num_bytes, self.device, group, symmetric=self.kind == "symmetric")
        if isinstance(made, str):
            self.state = self.state if self._block is not None else f"not registered: {made}"
            return
        self._registered.append(made)
        self._block = made.memory
        how = "registered with NCCL" + ", as a window on all ranks" * (self.kind == "symmetric")
        self.state = f"{how}; {self.kept_bytes / 2**20:,.1f} MiB are kept between steps"

    def _problem(self, num_bytes: int, *, together: bool) -> str:
        """Why a block of so many bytes is not to be registered; empty if it is."""
        if self.kind == "plain":
            return "ZGRAPH_ARENAS=plain"
        if self._group() is None:
            return "one rank has no collectives"
        if self.kind == "symmetric" and not together:
            return "this rank met sizes alone, and windows are made by all ranks together"
        kept = self.kept_bytes + num_bytes
        if self.room_bytes is not None and kept > self.room_bytes:
            return f"the budget has no room to keep {kept / 2**20:,.1f} MiB beside the optimizer's step"
        return ""


def _released(blocks: list[RegisteredBlock]) -> None:
    for block in blocks:
        block.release()
