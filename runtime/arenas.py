"""Memory in which programs lay out what collectives read and write: taken for each run, or there for good and known to
NCCL, which then moves data with fewer of the GPU's multiprocessors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from zgraph.bridge.private_arenas import PooledBlock, pooled_block
from zgraph.errors import BudgetError, PeerError
from zgraph.ir import Plan
from zgraph.runtime.circle import rank_names
from zgraph.runtime.heartbeat import BEAT_SECONDS
from zgraph.runtime.peers import Peers
from zgraph.runtime.store_errors import store_errors

ALIKE_SECONDS = 5.0
"""How long a rank that cannot make a window waits for the others to say the same."""

_REMEDY = "Set ZGRAPH_ARENAS=registered, with which no rank waits for another, or a smaller memory_budget."


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
        peers: all ranks of the model, with which windows are made; None for one rank.

    `turns` are those of all programs with memory that stays. `room_bytes` is what a block that stays may take; None
    sets no limit. `state` says what became of it, in words.
    """

    def __init__(
        self, device: torch.device, group: Callable[[], dist.ProcessGroup | None], kind: str, peers: Peers | None = None
    ) -> None:
        self.device, self.kind, self.peers = device, kind, peers
        self.room_bytes: int | None = None
        self.state = ""
        self.turns = Turns(device)
        self._group = group
        self._block: torch.Tensor | None = None
        self._registered: list[PooledBlock] = []
        self._num_asked = 0
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

        Raises:
            BudgetError: this rank has no memory for a window, and others have.
            PeerError: the same of another rank. No rank waits for it longer than it takes to tell.
        """
        num_bytes = most_bytes(plan)
        if self.device.type != "cuda" or not num_bytes:
            return
        if self._block is not None and num_bytes <= self._block.nbytes:
            return
        if isinstance(made := self._made(num_bytes, together=together), str):
            self.state = self.state if self._block is not None else f"not registered: {made}"
            return
        self._registered.append(made)
        self._block = made.memory
        how = "registered with NCCL" + ", as a window on all ranks" * (self.kind == "symmetric")
        self.state = f"{how}; {self.kept_bytes / 2**20:,.1f} MiB are kept between steps"

    def _made(self, num_bytes: int, *, together: bool) -> PooledBlock | str:
        """A block that is registered, or why there is none. Raises what `reserve` does."""
        group, is_window = self._group(), self.kind == "symmetric" and together
        made: PooledBlock | str = self._problem(num_bytes, together=together)
        if not made:
            assert group is not None
            made = pooled_block(num_bytes, self.device, group)
        if is_window and group is not None:
            self._compare(made if isinstance(made, str) else "", num_bytes)
        if isinstance(made, str):
            return made
        problem = made.register(symmetric=is_window)
        if is_window and self.peers is not None:
            self.peers.raise_doom()  # another rank failed while this one was in NCCL, which then gave up
            if problem:
                self._end_alone(problem, num_bytes)
        return problem or made

    def _compare(self, problem: str, num_bytes: int) -> None:
        """Raise on all ranks if some have memory for a window and others have not: making one waits for all."""
        if self.peers is None:
            return
        self._num_asked += 1
        problems = self.peers.exchange(f"memory for a window/{self._num_asked}", problem)
        lacking = {rank: text for rank, text in zip(self.peers.ranks, problems, strict=True) if text}
        if not lacking or len(lacking) == len(problems):
            return
        message = _no_window(lacking, num_bytes)
        raise BudgetError(message) if problem else PeerError(message)

    def _end_alone(self, problem: str, num_bytes: int) -> None:
        """Have all ranks raise, unless the window failed on each of them: who has begun one waits in NCCL for good."""
        assert self.peers is not None
        place = f"window/{self._num_asked}"
        with store_errors():
            all_failed = bool(self.peers.smallest(place, place, 1, ALIKE_SECONDS))
        if not all_failed:
            self.peers.await_doom(2 * BEAT_SECONDS)  # NCCL may have given up here as another rank failed
            error = PeerError(_no_window({self.peers.rank: problem}, num_bytes))
            self.peers.end_all(error)
            raise error

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


def _no_window(lacking: Mapping[int, str], num_bytes: int) -> str:
    """Message of ranks that cannot make a window, by the reason of the first."""
    size, said = f"{num_bytes / 2**20:,.1f} MiB", next(iter(lacking.values()))
    return f"{rank_names(lacking)} cannot register {size} as a window on all ranks: {said}. {_REMEDY}"


def _released(blocks: list[PooledBlock]) -> None:
    for block in blocks:
        block.release()
