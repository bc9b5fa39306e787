"""One compiled model at run time: its shards, its peers, and what lives from one call to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.environment import environment
from zgraph.errors import PeerError, ZgraphError
from zgraph.ir import Node, Plan, TensorType
from zgraph.ir.layout import chunk_numel
from zgraph.runtime.agreement import described
from zgraph.runtime.arenas import Arenas
from zgraph.runtime.feedback import Feedback
from zgraph.runtime.gloo_transport import Lane
from zgraph.runtime.host import HostMemory
from zgraph.runtime.hosts import Hosts, host_name
from zgraph.runtime.journal import Moved, journal_of
from zgraph.runtime.last_copies import LastCopies
from zgraph.runtime.peers import Peers
from zgraph.runtime.ranges import Ranges
from zgraph.runtime.recorder import Watcher
from zgraph.runtime.shards import ShardStore, Slot
from zgraph.runtime.watch import DeviceMarks, HostMarks, Watch


class Session:
    """The state that linked programs work on.

    Args:
        store: the parameters at rest.
        group: the ranks that share the model; None for one rank. Where several hold the same shard, the store's mesh
            says which.
        name: a name for the model that is the same on all ranks and used for no other.

    `adds_nothing` says that this rank's calls count for nothing in gradients: see `zgraph.join`.
    """

    def __init__(self, store: ShardStore, group: dist.ProcessGroup | None, name: str) -> None:
        self.store, self.device = store, store.device
        self.num_ranks, self.num_shards = store.num_ranks, store.num_shards
        self._group = group
        self._data_group = store.ranks.data_group if group is not None else None
        self._has_copies = self.num_ranks > self.num_shards
        self._peers = Peers(group, name, store.device) if group is not None else None
        store.peers = self._peers
        self._is_broken = False
        self._lane: Lane | None = None
        if self._peers is not None and self.device.type == "cpu" and self.num_ranks > 1:
            if self._has_copies:
                self._hosts = Hosts.rows_of(self.num_ranks, self.num_shards)
            else:
                names = dict(zip(self._peers.ranks, self._peers.exchange("host", host_name()), strict=True))
                self._hosts = Hosts.of([names[rank] for rank in store.ranks.data_ranks])
            self._lane = self._open_lane()
        self._watch = self._watched() if self._peers is not None and not self._peers.polls else None
        self.syncs = True
        self.adds_nothing = False
        self.num_plans_run = 0
        self.loss_only_call = False
        self.tangents: tuple[TensorType, ...] = ()
        self.absent: frozenset[int] = frozenset()
        self.recorder: Watcher | None = None
        self.reduce_dtype: torch.dtype | None = None
        self.before_reading: Callable[[], None] | None = None
        self.feedback = Feedback(self)
        self.copies = LastCopies(self)
        sharded = self.shard_group if group is not None else None
        self.arenas = Arenas(self.device, lambda: sharded, environment().arenas, self._peers)
        self._ranges = Ranges()
        self.plans: list[Plan] = []
        self.kinds: dict[str, TensorType] = {}
        self._kept: dict[object, tuple[int, torch.Tensor]] = {}
        self._version: int | None = None
        self.agreed: set[tuple[object, ...]] = set()
        self.marks: dict[int, bytes] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """The data ranks: those that reduce gradients together."""
        assert self._data_group is not None, "a plan for one rank has no collectives"
        return self._data_group

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that hold the shards of one copy of the model, this one among them."""
        assert self.store.mesh is not None
        return self.store.mesh.get_group(self.store.mesh.ndim - 1) if self._has_copies else self.group

    @property
    def copy_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shard; None where this is the only one."""
        assert self.store.mesh is not None
        return self.store.mesh.get_group(self.store.mesh.ndim - 2) if self._has_copies else None

    @property
    def num_copies(self) -> int:
        """Ranks that hold the same shard, this one among them."""
        return self.num_ranks // self.num_shards

    @property
    def copy(self) -> int:
        """This rank's number among those that hold the same shard."""
        return self.store.ranks.data_rank // self.num_shards

    def divisor(self, kind: TensorType) -> int:
        """The divisor of the sum over all ranks, to reduce a value of this type."""
        copies = self.num_copies
        return kind.divisor((copies, self.num_shards) if copies > 1 else (self.num_shards,))

    def divisor_of(self, slot: Slot) -> int:
        """The divisor of the sum over all ranks, to reduce the gradient of a parameter."""
        return self.divisor(self.kinds[slot.name]) if slot.name in self.kinds else self.num_ranks

    @property
    def reduces(self) -> bool:
        """Whether a backward reduces gradients: no_sync puts it off, and an optimizer may do it itself."""
        return self.syncs and not self.store.keeps_gradients

    @property
    def is_alone(self) -> bool:
        """Whether no other rank shares the model."""
        return self._peers is None

    @property
    def peers(self) -> Peers:
        assert self._peers is not None, "a plan for one rank waits for nobody"
        return self._peers

    @property
    def doom(self) -> ZgraphError | None:
        """Why the ranks cannot go on, once the heartbeat has found out: collectives were aborted, and what is computed
        from then on may be torn.
        """
        return self._peers.doom if self._peers is not None else None

    def raise_doom(self) -> None:
        """Raise `doom`, if there is one."""
        if self._peers is not None:
            self._peers.raise_doom()

    @property
    def host(self) -> HostMemory:
        """The host's memory, for what is offloaded."""
        return self.store.host

    @property
    def watcher(self) -> Watcher | None:
        """Who is told how programs go on: whoever measures, or torch's profiler while it is on; mostly nobody."""
        return self._ranges if self.recorder is None and private_runtime.is_profiling() else self.recorder

    @property
    def lane(self) -> Lane | None:
        """Where collectives run on CPUs; None where the process group's own backend has what is needed."""
        return self._lane

    def _open_lane(self) -> Lane:
        peers = self.peers
        try:
            name = f"{peers.name}/lane/{peers.call}"
            ranks = self.store.ranks
            own = f"{name}/{ranks.model_rank}" if ranks.num_model else name
            lane = Lane(peers.store, own, ranks.data_rank, self._hosts, each_has_all=self._has_copies)
        except RuntimeError as error:
            raise PeerError(
                f"rank {peers.rank} cannot connect to its peers {list(peers.ranks)}: {error}. After an error all ranks "
                "must go on alike; start the job again from its last checkpoint."
            ) from None
        weakref.finalize(self, lane.close)
        lane.journal.name, lane.journal.call = name, peers.call
        peers.keep_journal(lane.journal)
        return lane

    def _watched(self) -> Watch:
        """Whoever looks on where this rank's waits are its device's."""
        peers, is_gpu = self.peers, self.device.type != "cpu"
        if self._lane is None:
            peers.keep_journal(journal_of(peers.ranks))
        assert peers.journal is not None
        marks = DeviceMarks(self.device) if is_gpu else HostMarks(peers)
        watch = Watch(peers, peers.journal, marks, partial(_abort, weakref.ref(self)))
        peers.let_watch(watch)
        return watch

    def abort(self, rank: int) -> None:
        """End the collectives that are under way with a rank: the model is of no use afterwards."""
        if self._lane is not None:
            self._lane.close()
        else:
            private_runtime.abort_groups(rank)

    def enter(self, kind: str, moved: Moved) -> None:
        """Note a collective that begins and is not a lane's."""
        if self._watch is not None:
            self._watch.enter(kind, moved)

    def moved(self, node: Node) -> Moved:
        """Identity of the data that a collective of an agreed plan moves."""
        return Moved(self.marks.get(id(node), b""), described(node))

    def begin_call(self) -> None:
        """A new call of the model begins: what was said of earlier ones is past."""
        self.num_plans_run, self.loss_only_call, self.tangents = 0, False, ()
        if self._peers is None:
            return
        try:
            self._peers.begin_call()
        except PeerError as error:
            self.fail(error)
            raise
        if self._is_broken:
            self._peers.raise_drift()
            self.copies.forget()
        if self._is_broken and self._lane is not None:
            self._lane.close()  # what was under way when the last call failed is lost, on all ranks
            self._lane = self._open_lane()
        self._is_broken = False

    def fail(self, error: BaseException) -> None:
        """Tell the peers that this rank cannot go on."""
        self._is_broken = True
        if self._peers is not None:
            self._peers.failed_call = self._peers.call
        if self._peers is not None and not isinstance(error, PeerError):
            self._peers.fail(error)

    def synchronize(self) -> None:
        """Wait for the peers to come here too."""
        dist.barrier(self._group)

    # --- gradients ---------------------------------------------------------------------------------------------

    def mean(self, slot: Slot, gradient: torch.Tensor, divisor: int = 0) -> torch.Tensor:
        """A whole gradient averaged over the ranks: this rank's padded chunk where the parameter is sharded.

        Args:
            slot: the parameter.
            gradient: this rank's.
            divisor: divisor of the sum; 0 takes the number of ranks.
        """
        if self.num_ranks == 1:
            return gradient
        gradient = gradient.to(self.reduce_dtype or gradient.dtype)
        if not slot.is_sharded:
            return self._all_reduced(slot, gradient, divisor or self.num_ranks)
        chunk = chunk_numel(tuple(slot.placeholder.shape), self.num_shards)
        padded = gradient.new_zeros(self.num_shards, chunk)
        padded.view(-1)[: gradient.numel()].copy_(gradient.reshape(-1))
        if self._lane is not None:
            work = self._lane.reduce_scatter(padded.unbind(), moved=_moved(slot), divisor=divisor)
            self.peers.wait(work, slot.name)
            made: torch.Tensor = work.result[0]
            return made
        total = self._all_reduced(slot, padded, divisor or self.num_ranks)
        return total[self.store.shard].clone()

    def _all_reduced(self, slot: Slot, gradient: torch.Tensor, divisor: int) -> torch.Tensor:
        """The divided sum over all ranks."""
        if self._lane is None:
            total = gradient.div(divisor).contiguous()
            self.enter("all-reduce", _moved(slot))
            self.peers.wait(dist.all_reduce(total, group=self.group, async_op=True), slot.name)
            return total
        padded = gradient.new_zeros(self.num_ranks, -(-gradient.numel() // self.num_ranks))
        padded.view(-1)[: gradient.numel()].copy_(gradient.reshape(-1))
        self.peers.wait(self._lane.all_reduce(padded.unbind(), _moved(slot), divisor), slot.name)
        return padded.view(-1)[: gradient.numel()].view(gradient.shape)

    # --- gathered copies that may stay -------------------------------------------------------------------------

    def kept_copy(self, key: object) -> torch.Tensor | None:
        """A whole parameter gathered earlier under no_sync, unless a shard has been written to since."""
        version, copy = self._kept.get(key, (None, None))
        return copy if version is not None and version == self._version_now() else None

    def forget_copies(self) -> None:
        """Let go of them."""
        self._kept.clear()

    def keep_copy(self, key: object, whole: torch.Tensor) -> None:
        """Keep a gathered parameter for the next micro-step, if this one does not end the step."""
        if not self.syncs:
            self._kept[key] = (self._version_now(), whole)

    def begin_program(self) -> None:
        """A program begins, in which no shard is written to."""
        self._version = None

    def _version_now(self) -> int:
        """The store's version, which counts all parameters: once a program, not once a gather."""
        if self._version is None:
            self._version = self.store.version
        return self._version


def _abort(session: weakref.ref[Session], rank: int) -> None:
    if (found := session()) is not None:
        found.abort(rank)


def _moved(slot: Slot) -> Moved:
    """Identity of a gradient that no plan reduces."""
    return Moved(slot.name.encode(), f"the reduction of {slot.name}'s gradient")
