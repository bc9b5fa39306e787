"""Everything gathered, for what runs eagerly: a forward that cannot be captured as one graph, and generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from zgraph.bridge import private_runtime
from zgraph.runtime.session import Session
from zgraph.runtime.shards import Slot


@contextmanager
def whole_parameters(session: Session) -> Iterator[None]:
    """The model with whole parameters in the dtype to compute in, of which no gradient is wanted."""
    session.begin_call()
    try:
        with torch.no_grad():
            whole = [nn.Parameter(_full(session, s), requires_grad=False) for s in session.store.slots.values()]
    except BaseException as error:
        session.fail(error)
        raise
    before = []
    for slot, parameter in zip(session.store.slots.values(), whole, strict=True):
        for owner, key in slot.owners:
            before.append((owner, key, owner[key]))
            owner[key] = parameter
    try:
        yield
    finally:
        for owner, key, held in before:
            owner[key] = held


def _full(session: Session, slot: Slot) -> torch.Tensor:
    """A parameter as it is computed with: on the device, gathered where it is sharded."""
    chunk = slot.rest.to(session.device, slot.placeholder.dtype)
    if not slot.is_sharded:
        return chunk
    out = chunk.new_empty(chunk.numel() * session.num_shards)
    work = private_runtime.all_gathers([(out, chunk)], session.shard_group)
    session.peers.wait(work, slot.name)
    return out[: slot.placeholder.numel()].view(slot.placeholder.shape)


def eager_fallback(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """`forward` with every parameter whole from its beginning to the end of the backward.

    Gradients are averaged over the ranks when the backward ends.
    """
    warnings.warn(
        "fullgraph=False: all parameters are gathered for the length of a call and the model runs eagerly; memory at "
        "the peak is that of the whole model. Make the forward one graph to have it compiled.",
        stacklevel=3,
    )
    gathered = _GatheredModel(session)

    def call(*args: Any, **kwargs: Any) -> Any:
        gathered.gather()
        result = forward(*args, **kwargs)
        gathered.share_buffers()
        if not torch.is_grad_enabled():
            gathered.free()
        return result

    return call


class _GatheredModel:
    """The placeholders of a session, filled for as long as somebody may read them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.slots = list(session.store.slots.values())
        self.waiting = False
        self.version = -1
        for slot in self.slots:
            if slot.placeholder.requires_grad:
                slot.placeholder.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _: self.at_end()
                )

    def gather(self) -> None:
        """Fill the placeholders, unless they hold the present values already."""
        if self.version == self.session.store.version:
            return
        for slot in self.slots:
            if slot.placeholder is not slot.parameter:
                with torch.no_grad():
                    slot.placeholder.untyped_storage().resize_(slot.placeholder.nbytes)
                    slot.placeholder.copy_(_full(self.session, slot))
        self.version = self.session.store.version

    def share_buffers(self) -> None:
        """Copy the first rank's buffers to every rank, after a forward in training may have changed them."""
        if self.session.num_ranks > 1 and self.session.store.model.training:
            with torch.no_grad():
                for buffer in self.session.store.model.buffers():
                    buffer.data.copy_(self.session.store.from_first_rank(buffer))  # unseen by autograd, which saved it

    def free(self) -> None:
        self.version = -1
        for slot in self.slots:
            if slot.placeholder is not slot.parameter and slot.is_sharded:
                slot.placeholder.untyped_storage().resize_(0)

    def at_end(self) -> None:
        """Have the gradients reduced when the backward that runs now is over."""
        if not self.waiting:
            self.waiting = True
            Variable._execution_engine.queue_callback(self.reduce)

    def reduce(self) -> None:
        self.waiting = False
        if not self.session.syncs:
            return
        if self.session.num_ranks > 1 or any(s.placeholder is not s.parameter for s in self.slots):
            with torch.no_grad():
                for slot in self.used():
                    gradient = slot.placeholder.grad
                    slot.placeholder.grad = None
                    whole = torch.zeros_like(slot.placeholder) if gradient is None else gradient
                    slot.accumulate(self.session.mean(slot, whole).to(slot.rest.dtype))
        self.free()

    def used(self) -> list[Slot]:
        """The parameters that have a gradient on any rank: each rank may have gone another way through the forward."""
        mine = torch.tensor([s.placeholder.grad is not None for s in self.slots], dtype=torch.uint8)
        if self.session.num_ranks > 1:
            mine = mine.to(self.session.device)
            work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.session.group, async_op=True)
            self.session.peers.wait(work, "which parameters have gradients")
        return [slot for slot, has in zip(self.slots, mine.tolist(), strict=True) if has]
