"""Error feedback: what the codes of a parameter's gradient have left out so far, which the next code takes with it.

A rest lies as the numbers that are coded do, bucket by bucket, in fp32: of what a rank adds to a reduction all parts,
[ranks, numbers of a part]; of a part that its owner codes once more that part, [1, numbers]. Another graph of the same
model may have other buckets: rests move there with their parameters.

Where several ranks hold the same shard, parts are those of the shard, [ranks that hold it, numbers of a part], whatever
parameters they begin and end in. The rest of a part then moves to what its owner adds itself, which comes to the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_runtime
from zgraph.errors import StateDictError
from zgraph.ir import DType, TensorType
from zgraph.ir.layout import BucketLayout, bucket_layout, chunk_numel

MOST_BUCKETS = 12
"""Buckets of which a report says how far they are off."""


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are coded together.

    Args:
        names: of the parameters, in order.
        dtype: of what is coded, by which members are aligned.
        is_part: whether it is the part that this rank owns, coded once more.
    """

    names: tuple[str, ...]
    dtype: DType
    is_part: bool = False


class Owner(Protocol):
    """The session of the model, as far as it is needed here."""

    store: Any
    device: torch.device
    num_ranks: int
    num_shards: int

    @property
    def num_copies(self) -> int:
        """The ranks that hold the same shard."""

    @property
    def copy(self) -> int:
        """This rank's number among them."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that reduce gradients together."""

    def divisor_of(self, slot: Any) -> int:
        """The divisor of the sum over all ranks, to reduce the gradient of a parameter."""


_MADE: WeakSet[Feedback] = WeakSet()
"""Those of all models of this process."""


def forget_rests(model: object) -> None:
    """Go on with nothing left out by the codes of a model's gradients, where it has any."""
    for feedback in list(_MADE):
        if feedback.session.store.model is model:
            feedback.clear()


class Feedback:
    """The rests of one model on this rank. They are zero until the first code.

    Args:
        session: of the model.

    Attributes:
        errors: of each bucket the relative error of its first code: the norm of what that left out over the norm of
            what was coded.
    """

    def __init__(self, session: Owner) -> None:
        self.session = session
        _MADE.add(self)
        self.errors: dict[Bucket, torch.Tensor] = {}
        self._flats: dict[Bucket, torch.Tensor] = {}
        self._homes: dict[tuple[str, bool], Bucket] = {}

    def of(self, bucket: Bucket) -> torch.Tensor:
        """The rest of a bucket, [ranks, numbers of a part] in fp32, to be changed in place."""
        found = self._flats.get(bucket)
        if found is not None and all(self._homes.get((name, bucket.is_part)) is bucket for name in bucket.names):
            return found
        layout, copies = self._layout(bucket), self.session.num_copies
        rows, numel = 1 if bucket.is_part else self.session.num_shards, layout.part_numel
        if copies > 1:
            rows, numel = 1 if bucket.is_part else copies, -(-numel // copies)
        made = torch.zeros(rows, numel, dtype=torch.float32, device=self.session.device)
        for name in bucket.names if copies == 1 or not bucket.is_part else ():
            held = self._member(name, bucket.is_part)
            if held is not None:
                self._view(bucket, made, name).copy_(held)
            if copies > 1 and (part := self._part_of_shard(name)) is not None:
                self._view(bucket, made, name).add_(part / self._weight(name))
                del self._homes[name, True]
        self._flats[bucket] = made
        self._homes.update(((name, bucket.is_part), bucket) for name in bucket.names)
        in_use = set(self._homes.values())
        self._flats = {b: flat for b, flat in self._flats.items() if b in in_use}
        return made

    @property
    def num_bytes(self) -> int:
        """Bytes of all rests."""
        return sum(flat.nbytes for flat in self._flats.values())

    @property
    def most_bytes(self) -> int:
        """Bytes of all rests, if the gradients of all parameters are coded."""
        count, found = self.session.num_shards, 0
        copies = self.session.num_copies
        for slot in self.session.store.slots.values() if self.session.num_ranks > 1 else ():
            chunk = chunk_numel(tuple(slot.placeholder.shape), count)
            found += 4 * (chunk + -(-chunk // copies) if copies > 1 else chunk * (count + (not slot.is_sharded)))
        return found

    def __str__(self) -> str:
        """How far the first code of each bucket is off, for people; empty if nothing was coded."""
        said = []
        for bucket, error in list(self.errors.items())[:MOST_BUCKETS]:
            more = f" and {len(bucket.names) - 1} more" if len(bucket.names) > 1 else ""
            said.append(f"{bucket.names[0]}{more}{' (by its owner)' * bucket.is_part} {float(error):.2%}")
        rest = len(self.errors) - MOST_BUCKETS
        return ", ".join(said) + (f", and {rest} buckets more" if rest > 0 else "")

    def _layout(self, bucket: Bucket) -> BucketLayout:
        slots = self.session.store.slots
        shapes = [tuple(slots[name].placeholder.shape) for name in bucket.names]
        return bucket_layout([TensorType(bucket.dtype, shape) for shape in shapes], self.session.num_shards)

    def _member(self, name: str, is_part: bool) -> torch.Tensor | None:
        """The rest of one parameter, [ranks, numbers of its part]; None where nothing was coded yet."""
        bucket = self._homes.get((name, is_part))
        return None if bucket is None else self._view(bucket, self._flats[bucket], name)

    def _view(self, bucket: Bucket, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The numbers of one parameter in the rest of a bucket; of a shard [1, numbers] of it, whatever its parts."""
        layout, at = self._layout(bucket), bucket.names.index(name)
        rows = flat if self.session.num_copies == 1 else flat.view(1, -1)
        return rows[:, layout.offsets[at] : layout.offsets[at] + layout.chunks[at]]

    def _slices(self, name: str) -> tuple[torch.Tensor, slice] | None:
        """The part of a shard that this rank codes once more, as far as it is of one parameter, and where in that."""
        bucket = self._homes.get((name, True))
        if bucket is None:
            return None
        layout, at, flat = self._layout(bucket), bucket.names.index(name), self._flats[bucket]
        begin, own = layout.offsets[at], self.session.copy * flat.shape[1]
        first = max(begin, own)
        last = max(min(begin + layout.chunks[at], own + flat.shape[1]), first)
        return flat[:, first - own : last - own], slice(first - begin, last - begin)

    def _part_of_shard(self, name: str) -> torch.Tensor | None:
        """The rest of the part of a shard that this rank codes once more, among zeros: [1, numbers of the shard]."""
        found = self._slices(name)
        if found is None:
            return None
        whole = torch.zeros(1, self._chunk(name), dtype=torch.float32, device=self.session.device)
        whole[:, found[1]] = found[0]
        return whole

    def _chunk(self, name: str) -> int:
        return chunk_numel(tuple(self.session.store.slots[name].placeholder.shape), self.session.num_shards)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def evened(self) -> dict[str, torch.Tensor]:
        """Rest that is still due to each parameter's gradient: the whole, in fp32. All ranks call it.

        It is split evenly over the ranks on the way: what they go on with here is what whoever loads it goes on with,
        whatever the number of ranks.
        """
        session, found = self.session, dict[str, torch.Tensor]()
        shard = session.store.shard
        for name in sorted({name for name, _ in self._homes}):
            own = self._member(name, False)
            assert own is not None
            if session.num_copies > 1:
                due = torch.zeros(session.num_shards, own.shape[1], dtype=own.dtype, device=own.device)
                due[shard] = own[0] * self._weight(name)
                part = self._part_of_shard(name)
            else:
                due, part = own * self._weight(name), self._member(name, True)
            if part is not None:
                due[shard] += part[0]
            dist.all_reduce(due, group=session.group)
            found[name] = self._whole(name, due)
        self.clear()  # of padding, too
        for name, whole in found.items():
            self.put(name, whole)
        return found

    def put(self, name: str, whole: torch.Tensor) -> None:
        """Take what is due to a parameter's gradient, in the place of what was due here."""
        session = self.session
        if (name, False) not in self._homes:
            self.of(Bucket((name,), DType.f32))
        own = self._member(name, False)
        assert own is not None
        due = torch.zeros(session.num_shards, self._chunk(name), dtype=own.dtype, device=own.device)
        due.view(-1)[: whole.numel()].copy_(whole.reshape(-1))
        if session.num_copies > 1:
            own.copy_(due[session.store.shard] / (self._weight(name) * session.num_copies))
            part = self._slices(name)
        else:
            own.copy_(due / (self._weight(name) * session.num_ranks))
            held = self._member(name, True)
            part = None if held is None else (held, slice(None))
        if part is not None:
            part[0].zero_()

    def clear(self) -> None:
        """Forget all rests."""
        for flat in self._flats.values():
            flat.zero_()

    def _weight(self, name: str) -> float:
        """How much of the reduced gradient a rest of this rank's own addend is: of a shard that others hold, too, it is
        reduced along the shard axis already.
        """
        session = self.session
        divisor = session.divisor_of(session.store.slots[name])
        inside = session.num_shards if session.num_copies > 1 and divisor > 1 else 1
        return inside / divisor

    def _whole(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        shape = self.session.store.slots[name].placeholder.shape
        return rows.reshape(-1)[: shape.numel()].view(shape)


class FeedbackState:
    """Rests of the codes of a model's gradients, for checkpoints: `torch.distributed.checkpoint` saves and loads it as
    it does a model or an optimizer.

    Args:
        feedback: of the model.

    It has a tensor for each parameter, in fp32, placed as the parameter is: what is still due to its gradient.
    """

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Rest that is due to each parameter's gradient. All ranks call it together; zero before the first step."""
        due = self.feedback.evened()
        return {
            name: self._placed(name, due.get(name, torch.zeros(slot.placeholder.shape, device=slot.rest.device)))
            for name, slot in self._slots()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, at any number of ranks.

        Raises:
            StateDictError: a parameter is missing, or has another shape.
        """
        given = {}
        for name, slot in self._slots():
            found = state.get(name)
            if found is None:
                raise StateDictError(
                    f"the feedback of {name} is missing; load what state_dict() of zgraph.feedback(model) gave"
                )
            if tuple(found.shape) != tuple(slot.placeholder.shape):
                raise StateDictError(
                    f"the feedback of {name} has shape {tuple(found.shape)}, and the parameter "
                    f"{tuple(slot.placeholder.shape)}; load the state of this model"
                )
            given[name] = found.full_tensor() if isinstance(found, DTensor) else found
        for name, whole in given.items():
            self.feedback.put(name, whole)

    def _slots(self) -> Iterator[tuple[str, Any]]:
        slots = self.feedback.session.store.slots
        return ((name, slots[name]) for name in sorted(slots) if slots[name].placeholder.requires_grad)

    def _placed(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        slot, session = self.feedback.session.store.slots[name], self.feedback.session
        if not slot.is_sharded:
            return whole.clone()
        rows = slot.placeholder.shape[0]
        each = -(-rows // session.num_shards)
        own = whole[session.store.shard * each : (session.store.shard + 1) * each].clone()
        return private_runtime.dtensor_like(own, cast(DTensor, slot.parameter))
