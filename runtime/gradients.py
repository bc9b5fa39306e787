"""The way of gradients from a compiled backward to the parameters at rest: through autograd's own graph.

torch.compile sees placeholders, not the parameters at rest. `attached` puts a node between both into the graph of each
call, so that autograd decides where gradients go:

    parameter at rest  ->  _Attach  ->  placeholder  ->  compiled forward  ->  loss
    AccumulateGrad     <-  _Attach  <-  token        <-  compiled backward <-

A gradient at rest is a shard, or lies in another dtype or on the host, which autograd does not accept as the gradient
of a whole placeholder. The compiled backward returns a *token* in its place: of the placeholder's shape, without
memory of its own, with the gradient as an attribute.

Under no_sync, gradients of stages 0 and 1 are *unreduced*: this rank's own; where the model runs eagerly, those of all
stages. They are in `.grad` as well, where `zero_grad` finds them: of a DTensor as a DTensor that is `Partial`, of a
plain tensor as DDP leaves them. The next backward that syncs takes them with it, and so does `optimizer.step()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from zgraph.bridge import private_runtime
from zgraph.bridge.private_pause import pause_capture, resume_capture
from zgraph.errors import UsageError
from zgraph.runtime.foreign_shards import check_states
from zgraph.runtime.session import Session
from zgraph.runtime.shards import Slot

Run = Callable[..., Any]


def attached(run: Run, parameters: Mapping[int, str], session: Session) -> Run:
    """`run`, with the placeholders among its arguments attached to their parameters at rest.

    Args:
        run: a compiled graph.
        parameters: which parameter each argument is, by position.
        session: whose parameters.
    """
    slots = session.store.slots
    mine = {index: slots[name] for index, name in parameters.items() if needs_token(slots[name], session)}
    if not mine:
        return run

    def call(*args: Any) -> Any:
        if session.before_reading is not None:
            session.before_reading()
        trained = {i: slot for i, slot in mine.items() if args[i].requires_grad} if torch.is_grad_enabled() else {}
        if not trained:
            return run(*args)
        given = list(args)
        attached = _Attach.apply(session, [*trained.values()], *(s.parameter for s in trained.values()))  # type: ignore[no-untyped-call]
        for index, placeholder in zip(trained, attached, strict=True):
            given[index] = placeholder
        return run(*given)

    return call


def needs_token(slot: Slot, session: Session) -> bool:
    """Whether autograd cannot bring the gradient to the parameter by itself."""
    return slot.placeholder is not slot.parameter or not session.is_alone


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient of a parameter, as a backward made it.

    Args:
        tensor: a padded chunk where the parameter is sharded, else the whole; the whole if it is unreduced.
        is_unreduced: whether this rank alone made it.
    """

    tensor: torch.Tensor
    is_unreduced: bool = False


def token(slot: Slot, gradient: Gradient) -> torch.Tensor:
    """The token that a compiled backward returns in the place of a gradient: see above."""
    made = _zero(slot.placeholder.dtype, slot.placeholder.device).expand(slot.placeholder.shape)
    made.zgraph_gradient = gradient  # type: ignore[attr-defined]
    return made


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros((), dtype=dtype, device=device)


class _Attach(torch.autograd.Function):
    """From parameters at rest to their placeholders, and from tokens to gradients at rest."""

    @staticmethod
    def forward(ctx: Any, session: Session, slots: Sequence[Slot], *parameters: torch.Tensor) -> Any:
        ctx.session, ctx.slots = session, slots
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunctionSubclass():  # to detach the placeholder of a piece would gather it
            return tuple(slot.placeholder.detach() for slot in slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Any) -> Any:
        found: list[torch.Tensor | None] = []
        gradients = _brought(
            ctx.session, ctx.slots, [None if made is None else made.zgraph_gradient for made in tokens]
        )
        for slot, gradient, (node, _) in zip(ctx.slots, gradients, ctx.next_functions, strict=True):
            found.append(None if gradient is None else delivered(ctx.session, slot, gradient, node))
        return None, None, *found


def _brought(session: Session, slots: Sequence[Slot], gradients: list[Gradient | None]) -> list[Gradient | None]:
    """A backward's gradients. What stays unreduced, of parameters on the host, is there; the host waited once."""
    last, sources = None, []
    for number, (slot, made) in enumerate(zip(slots, gradients, strict=True)):
        if made is None or not made.is_unreduced or made.tensor.device.type == slot.rest.device.type:
            continue
        if slot.parameter.grad is None or is_unreduced(slot):
            sources.append(made.tensor.to(slot.rest.dtype))
            target, last = session.host.offload(sources[-1])
            gradients[number] = Gradient(target, is_unreduced=True)
    if last is not None:
        last.synchronize()  # copies of one lane are over in their order
    return gradients


def delivered(session: Session, slot: Slot, gradient: Gradient, node: Any) -> torch.Tensor | None:
    """The gradient for autograd to bring to the parameter; None once it is there, or where nobody asked for it."""
    if not private_runtime.will_accumulate(node):
        return _at_rest(session, slot, gradient)
    if not slot.parameter._backward_hooks:
        accumulate(session, slot, gradient)
        return None
    return _at_rest(session, slot, _addable(session, slot, gradient))  # autograd runs the hooks, and adds


def accumulate(session: Session, slot: Slot, gradient: Gradient) -> None:
    """Add to `.grad` what a backward made."""
    parameter, made = slot.parameter, _at_rest(session, slot, _addable(session, slot, gradient))
    held = parameter.grad
    if held is None:
        parameter.grad = made
    else:
        _local(held).add_(_local(made))


def _addable(session: Session, slot: Slot, gradient: Gradient) -> Gradient:
    """The gradient, which is about to be added to `.grad`: reduced, if what is there is reduced.

    What is there is placed as the parameter is: autograd leaves that of a penalty on few rows whole on every rank.
    """
    held = slot.parameter.grad
    if isinstance(held, DTensor) and all(p.is_replicate() for p in held.placements) and slot.is_sharded:
        slot.parameter.grad = held.redistribute(placements=slot.parameter.placements)  # type: ignore[attr-defined]
    if slot.parameter.grad is None:
        slot.holds_unreduced = gradient.is_unreduced
    elif gradient.is_unreduced and not is_unreduced(slot):
        return Gradient(_reduced(session, slot, gradient.tensor.to(slot.rest.dtype)))
    return gradient


def _at_rest(session: Session, slot: Slot, gradient: Gradient) -> torch.Tensor:
    """The gradient as the parameter's `.grad` holds it, in memory of its own."""
    parameter, tensor = slot.parameter, gradient.tensor
    if not gradient.is_unreduced:
        return _laid_out(slot.local_part(tensor) if slot.is_sharded else tensor, parameter)
    whole = tensor.to(slot.rest.device, slot.rest.dtype)
    if not isinstance(parameter, DTensor):
        return whole.clone() if whole is tensor else whole
    mesh = parameter.device_mesh
    part = whole / session.divisor_of(slot)  # a sum is what every backend reduces
    placements = session.store.ranks.placements(slot.name, Partial())
    return private_runtime.dtensor(part, mesh, placements, parameter.shape, parameter.stride())


def _laid_out(own: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient as the parameter is laid out."""
    return private_runtime.dtensor_like(own, parameter) if isinstance(parameter, DTensor) else own


def is_unreduced(slot: Slot) -> bool:
    """Whether `.grad` of a parameter holds what this rank alone made."""
    gradient = slot.parameter.grad
    if isinstance(gradient, DTensor):
        return any(isinstance(p, Partial) for p in gradient.placements)
    return gradient is not None and slot.holds_unreduced


def with_unreduced(session: Session, slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
    """A backward's gradient of a parameter with what is unreduced in `.grad`, which moves there.

    It stays in `.grad` where this backward does not reach the parameter, as in `autograd.grad` for other tensors.
    """
    parameter = slot.parameter
    if not is_unreduced(slot) or not private_runtime.will_accumulate(private_runtime.accumulator(parameter)):
        return gradient
    held, parameter.grad = _unreduced(session, slot), None
    return gradient + _on_device(session, held).to(gradient.dtype)


def _on_device(session: Session, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient on the device; the host does not wait for the copy."""
    if gradient.device.type == session.device.type:
        return gradient
    session.host.to_device.settle()
    pinned = session.host.pool.empty_like(gradient)
    made, copy = session.host.reload(pinned.copy_(gradient))
    copy.wait()
    return made


def _unreduced(session: Session, slot: Slot) -> torch.Tensor:
    held = slot.parameter.grad
    assert held is not None
    return held._local_tensor * session.divisor_of(slot) if isinstance(held, DTensor) else held


def reduced(session: Session, slot: Slot) -> torch.Tensor | None:
    """This rank's part of the reduced gradient of a parameter; `.grad` stays as it is. All ranks must ask for it."""
    gradient = slot.parameter.grad
    if gradient is None or not is_unreduced(slot):
        return None if gradient is None else _local(gradient)
    made = _reduced(session, slot, _unreduced(session, slot))
    return slot.local_part(made) if slot.is_sharded else made


def _reduced(session: Session, slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
    """A whole gradient of this rank as the ranks' mean, in the memory that the parameter is in."""
    mean = session.mean(slot, _on_device(session, gradient), divisor=session.divisor_of(slot))
    return mean.to(slot.rest.device, slot.rest.dtype)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


REFUSED = {
    torch.optim.Adafactor: "its second moments are of whole matrices; take torch.optim.AdamW or zgraph.optim.Lion",
    torch.optim.LBFGS: "it takes all gradients as one vector; take torch.optim.AdamW or torch.optim.SGD",
    torch.optim.Rprop: "it assigns to parts of its states, which torch's DTensor does not do; take torch.optim.RMSprop",
    torch.optim.SparseAdam: "gradients of shards are dense; take torch.optim.AdamW",
}
"""Optimizers of torch that do not step over shards, and why."""

_MATRICES = "it works on whole matrices; take torch.optim.AdamW or zgraph.optim.Lion"
_VECTOR = (
    "it takes all parameters as one vector; take torch.optim.AdamW, or schedulefree for a rate that needs no schedule"
)
_COMPILED = "it compiles its step over tensors of a class of its own; take zgraph.optim.AdamW with offload='optimizer'"
REFUSED_ELSEWHERE = {
    **dict.fromkeys(("SOAP", "Shampoo", "DistributedShampoo", "ScalableShampoo", "Kron", "SM3"), _MATRICES),
    **dict.fromkeys(("CAME", "AdaFactor", "Adafactor", "Adalite", "Lamb", "LAMB"), _MATRICES),
    **dict.fromkeys(("Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptLion", "DAdaptAdaGrad"), _VECTOR),
    **dict.fromkeys(("AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8"), _COMPILED),
}
"""Optimizers of other packages that do not step over shards, by the names of their classes, and why."""


REFUSED_ALONG_MODEL_AXES = {
    "Muon": "it works on whole matrices, and of these a rank has a part",
    "CompactAdamW": "it rounds at random, and ranks that hold the same would round apart",
}
"""Optimizers of zgraph that do not step beside a model axis, and why."""


def _check_optimizer(optimizer: Optimizer, session: Session) -> None:
    """Raise UsageError for an optimizer that does not step over shards, before it changes anything."""
    kind = type(optimizer)
    for base in kind.__mro__ if session.store.ranks.num_model else ():
        if base.__module__.startswith("zgraph.") and base.__name__ in REFUSED_ALONG_MODEL_AXES:
            raise UsageError(
                f"zgraph.optim.{base.__name__} does not go with tensor parallelism: "
                f"{REFUSED_ALONG_MODEL_AXES[base.__name__]}; take torch.optim.AdamW"
            )
    package = kind.__module__.partition(".")[0]
    why = REFUSED.get(kind)
    if package not in ("torch", "zgraph"):
        why = why or REFUSED_ELSEWHERE.get(kind.__name__)
    sharded = {id(s.parameter) for s in session.store.slots.values() if s.is_sharded} if why else set()
    if any(id(p) in sharded for group in optimizer.param_groups for p in group["params"]):
        name = f"torch.optim.{kind.__name__}" if package == "torch" else f"{package}.{kind.__name__}"
        raise UsageError(f"{name} does not step over sharded parameters: {why}, or zgraph.compile with stage=0")


@contextmanager
def without_sync(session: Session) -> Iterator[None]:
    """Context whose backwards leave gradients unreduced. Post-accumulate hooks wait for the first backward behind it:
    an optimizer in a hook would else update with a part of a step's gradients.
    """
    hooks = [h for s in session.store.slots.values() if (h := private_runtime.grad_hooks(s.parameter))]
    for some in hooks:
        some.update({number: _Waiting(hook) for number, hook in some.items()})
    before, session.syncs = session.syncs, False
    try:
        yield
    finally:
        session.syncs = before
        for some in hooks:
            some.update({number: hook.hook for number, hook in some.items() if isinstance(hook, _Waiting)})


class _Waiting:
    """A hook that does not run for now; it may be removed meanwhile."""

    def __init__(self, hook: Callable[[torch.Tensor], None]) -> None:
        self.hook = hook

    def __call__(self, _: torch.Tensor) -> None:
        pass


def _steps_over(optimizer: Optimizer, session: Session) -> bool:
    mine = {id(slot.parameter) for slot in session.store.slots.values()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def watch_steps(session: Session) -> None:
    """Have every optimizer reduce first what is unreduced: a loader may end within an accumulation.

    The step would else part the ranks. Once collectives were aborted, a step raises why: its gradients may be torn. On
    the host it begins once nothing is copied from there. What it changes is noticed even where torch does not count it:
    steps over lists of DTensors raise no version (torch 2.13). Within a function under torch.compile, which does not
    trace DTensors whose part lies within a flat buffer, a step runs as it is.
    """
    watched = weakref.ref(session)
    begun: dict[int, tuple[int, Any]] = {}

    @torch.no_grad()
    def before(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        paused = pause_capture()
        session = watched()
        if session is None or not _steps_over(optimizer, session):
            resume_capture(paused)
            return
        session.raise_doom()
        _check_optimizer(optimizer, session)
        check_states(optimizer)
        reduces_itself = getattr(optimizer, "takes_unreduced", False)
        found = [s for s in session.store.slots.values() if is_unreduced(s)] if not reduces_itself else []
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]} if found else ()
        for slot in found:
            parameter = slot.parameter
            if id(parameter) in stepped and (made := reduced(session, slot)) is not None:
                parameter.grad, slot.holds_unreduced = _laid_out(made, parameter), False
        session.store.copies.settle()
        begun[id(optimizer)] = session.store.version, paused

    def after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        session = watched()
        if session is None or id(optimizer) not in begun:
            return
        version, paused = begun.pop(id(optimizer))
        resume_capture(paused)
        if version != session.store.version:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        private_runtime.bump_version([p for s in session.store.slots.values() if id(p := s.parameter) in stepped])

    for hook in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
        weakref.finalize(session, hook.remove)
