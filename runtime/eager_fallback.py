"""Everything gathered, for what runs eagerly: a forward that cannot be captured as one graph, and generation."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from zgraph.bridge import private_compile, private_runtime
from zgraph.runtime.gradients import Gradient, delivered, is_unreduced, needs_token, with_unreduced
from zgraph.runtime.journal import Moved
from zgraph.runtime.session import Session
from zgraph.runtime.shards import Slot
from zgraph.runtime.transfers import Transfer

Work = dist.Work | Transfer
CHECKPOINTED = (
    "torch.utils.checkpoint is around code that runs eagerly; its parameters are not there when it is computed again. "
    "Turn activation checkpointing off, or have the model captured, where recompute=True does the same"
)


@contextmanager
def whole_parameters(session: Session) -> Iterator[None]:
    """The model with whole parameters in the dtype to compute in, of which no gradient is wanted."""
    session.begin_call()
    try:
        with torch.no_grad():
            whole = [nn.Parameter(full(session, s), requires_grad=False) for s in session.store.slots.values()]
    except BaseException as error:
        session.fail(error)
        raise
    with session.store.held_as(session.store.slots.values(), whole):
        yield


def full(session: Session, slot: Slot) -> torch.Tensor:
    """A parameter as it is computed with: on the device, gathered where it is sharded."""
    chunk = slot.rest.to(session.device, slot.placeholder.dtype)
    own = _along_data(session, slot, chunk)
    if not session.store.ranks.is_cut(slot.name):
        return own
    return session.store.ranks.whole(slot.name, own, lambda work: session.peers.wait(work, slot.name))


def _along_data(session: Session, slot: Slot, chunk: torch.Tensor) -> torch.Tensor:
    """A parameter, gathered over the ranks that it is sharded over."""
    if not slot.is_sharded:
        return chunk
    out = chunk.new_empty(session.num_shards, chunk.numel())
    moved = Moved(slot.name.encode(), f"the gather of {slot.name} for eager code")
    if session.lane is not None:
        work: Work = session.lane.all_gather((out.unbind(), chunk), moved=moved)
    else:
        session.enter("all-gather", moved)
        work = private_runtime.all_gathers([(out.view(-1), chunk)], session.shard_group)
    session.peers.wait(work, slot.name)
    shape = session.store.ranks.shape(slot.name, slot.placeholder.shape)
    return out.view(-1)[: math.prod(shape)].view(shape)


def eager_fallback(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """`forward` with every parameter whole from its beginning to the end of the backward.

    Gradients are averaged over the ranks when the backward ends.
    """
    warnings.warn(
        'fullgraph="eager": all parameters are gathered for the length of a call and the model runs eagerly; memory at '
        "the peak is that of the whole model. Make the forward one graph to have it compiled.",
        stacklevel=3,
    )
    whole = _GatheredModel(session)
    refused = any(needs_token(slot, session) for slot in session.store.slots.values())
    checkpoints = partial(private_compile.without_checkpoints, CHECKPOINTED) if refused else nullcontext

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with whole.gathered(), checkpoints():
                result = forward(*args, **kwargs)
            whole.share_buffers()
        finally:
            whole.free_if_done()
        return result

    return call


class _Call:
    """One call whose backward may come: parameters stay whole for it."""

    def __init__(self) -> None:
        self.is_over = False


class _GatheredModel:
    """The placeholders of a session, filled for as long as somebody may read them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.slots = list(session.store.slots.values())
        self.calls: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.version = -1

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The model with whole parameters, which autograd knows as made of the parameters at rest."""
        self.fill()
        trained = [s for s in self.slots if s.parameter.requires_grad and needs_token(s, self.session)]
        if not trained or not torch.is_grad_enabled():
            yield
            return
        call = _Call()
        self.calls.add(call)
        attached = _AttachWhole.apply(self, call, trained, *(s.parameter for s in trained))  # type: ignore[no-untyped-call]
        with self.session.store.held_as(trained, attached):
            yield

    def fill(self) -> None:
        """Fill the placeholders, unless they hold the present values already."""
        if self.version == self.session.store.version:
            return
        for slot in self.slots:
            if slot.placeholder is not slot.parameter:
                with torch.no_grad():
                    slot.placeholder.untyped_storage().resize_(slot.placeholder.nbytes)
                    slot.placeholder.copy_(full(self.session, slot))
        self.version = self.session.store.version

    def share_buffers(self) -> None:
        """Copy the first rank's buffers to every rank, after a forward in training may have changed them."""
        if self.session.num_ranks > 1 and self.session.store.model.training:
            self.session.store.share_buffers()

    def free_if_done(self) -> None:
        """Let go of whole parameters, unless a backward may still read them."""
        if any(not call.is_over for call in self.calls):
            return
        self.version = -1
        for slot in self.slots:
            if slot.placeholder is not slot.parameter and slot.is_sharded:
                slot.placeholder.untyped_storage().resize_(0)

    def reduced(self, slots: Sequence[Slot], made: Sequence[torch.Tensor | None]) -> Iterator[tuple[int, Gradient]]:
        """The gradients of a backward, by position: averaged over the ranks, unless under no_sync.

        Each rank may have gone another way through the forward: one that has no gradient for a parameter gives zeros.
        """
        session = self.session
        if not session.reduces or session.is_alone:
            for index, gradient in enumerate(made):
                if gradient is not None:
                    yield index, Gradient(gradient, is_unreduced=not session.is_alone)
            return
        mine = [g is not None or is_unreduced(s) for s, g in zip(slots, made, strict=True)]
        has = torch.tensor(mine, dtype=torch.uint8, device=session.device)
        work = dist.all_reduce(has, dist.ReduceOp.MAX, group=session.group, async_op=True)
        session.peers.wait(work, "which parameters have gradients")
        for index, (slot, gradient, anywhere) in enumerate(zip(slots, made, has.tolist(), strict=True)):
            if anywhere:
                whole = torch.zeros_like(slot.placeholder) if gradient is None else gradient
                yield index, Gradient(session.mean(slot, with_unreduced(session, slot, whole)).to(slot.rest.dtype))


class _AttachWhole(torch.autograd.Function):
    """From parameters at rest to whole ones, and from whole gradients to gradients at rest."""

    @staticmethod
    def forward(ctx: Any, whole: _GatheredModel, call: _Call, slots: Sequence[Slot], *parameters: torch.Tensor) -> Any:
        ctx.whole, ctx.call, ctx.slots = whole, call, slots
        ctx.set_materialize_grads(False)
        return tuple(slot.placeholder.detach() for slot in slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *made: torch.Tensor | None) -> Any:
        whole, nodes = ctx.whole, [node for node, _ in ctx.next_functions]
        found: list[torch.Tensor | None] = [None] * len(made)
        for index, gradient in whole.reduced(ctx.slots, made):
            found[index] = delivered(whole.session, ctx.slots[index], gradient, nodes[index])
        ctx.call.is_over = not private_runtime.keeps_graph()
        whole.free_if_done()
        return None, None, None, *found
