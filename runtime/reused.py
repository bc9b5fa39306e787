"""A plan that runs without torch.compile around it: bound to a model's tensors by name, and to autograd by a function.

It does what AOTAutograd's wrapper does around the two halves of a plan, where nothing is aliased: buffers that were
written to get their new values, saved tensors wait with autograd, and outputs that need no gradient have none.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from zgraph.bridge.private_runtime import without_autocast
from zgraph.ir import InputKind, OutputKind, Phase, Plan, TensorType
from zgraph.runtime.gradients import attached
from zgraph.runtime.session import Session

Run = Callable[[list[Any]], Sequence[Any]]
"""Takes its arguments in a list that it empties as it goes, and returns its results."""


class Halves:
    """The runners of a plan, with what autograd has to know of it.

    Args:
        plan: the plan.
        forward: from the arguments to new values of buffers, outputs and saved values.
        backward: from saved values and tangents to gradients; None where there is none.
        requires_grad: of each output.
        buffers: gives the buffer of a name.
    """

    def __init__(
        self,
        plan: Plan,
        forward: Run,
        backward: Run | None,
        requires_grad: Sequence[bool],
        buffers: Callable[[str], torch.Tensor],
    ) -> None:
        self.forward, self.backward, self.requires_grad, self.buffers = forward, backward, requires_grad, buffers
        targets = {i.value.name: i.target for i in plan.graph.inputs}
        outputs = [o for o in plan.graph.outputs if o.phase is Phase.forward]
        arguments = {v.name: index for index, v in enumerate(plan.forward.arguments)}
        gradients = [o for o in plan.graph.outputs if o.phase is not Phase.forward]
        tangents = [i.value.tensor for i in plan.graph.inputs if i.kind is InputKind.tangent]
        self.written = [targets[o.target or ""] for o in outputs if o.kind is OutputKind.mutation]
        self.num_outputs = sum(o.kind is OutputKind.output for o in outputs)
        self.num_arguments = len(arguments)
        self.places = [arguments.get(o.target or "") for o in gradients]
        self.tangents = [_strides(kind) for kind in tangents]

    def run(self, args: list[Any]) -> tuple[list[Any], list[Any]]:
        """The outputs and the saved values; buffers have their new values."""
        with torch.no_grad(), without_autocast():
            made = [*self.forward(args)]
            begin, end = len(self.written), len(self.written) + self.num_outputs
            for name, value in zip(self.written, made[:begin], strict=True):
                self.buffers(name).copy_(value)
        return made[begin:end], made[end:]


def _strides(kind: TensorType) -> tuple[int, ...]:
    """The strides that a backward takes a tangent with."""
    shape = [int(size) for size in kind.shape]
    if kind.strides is not None:
        return tuple(int(stride) for stride in kind.strides)
    return torch.empty(shape, device="meta").stride()


class CompiledFunctionOfPlan(torch.autograd.Function):
    """Autograd's view of a plan. The beginning of its name is by which calls of compiled models are known."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, *args: Any) -> Any:
        outputs, saved = halves.run([*args])
        ctx.halves = halves
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in saved]
        ctx.others = [value for value in saved if not isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(value for value in saved if isinstance(value, torch.Tensor)))
        kept = zip(outputs, halves.requires_grad, strict=True)
        ctx.mark_non_differentiable(*(o for o, wants in kept if not wants and isinstance(o, torch.Tensor)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        halves: Halves = ctx.halves
        assert halves.backward is not None
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        args: list[Any] = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        wanted = [g for g, wants in zip(gradients, halves.requires_grad, strict=True) if wants]
        args += [_laid_out(g, strides) for g, strides in zip(wanted, halves.tangents, strict=True)]
        del tensors, gradients, wanted
        found: list[Any] = [None] * halves.num_arguments
        with without_autocast():
            for place, gradient in zip(halves.places, halves.backward(args), strict=True):
                if place is not None:
                    found[place] = gradient
        return None, *found


def _laid_out(tangent: torch.Tensor | None, strides: tuple[int, ...]) -> torch.Tensor | None:
    """A tangent with the strides that the backward was compiled for."""
    if tangent is None or tangent.stride() == strides:
        return tangent
    made = torch.empty_strided(tangent.size(), strides, dtype=tangent.dtype, device=tangent.device)
    return made.copy_(tangent)


@dataclass(frozen=True)
class Binding:
    """Binding of an argument of a plan: a parameter or a buffer by name, or an argument of the call by number."""

    kind: InputKind
    target: str


def bound(halves: Halves, binding: Sequence[Binding], session: Session) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """From the leaves of a call's arguments to the plan's outputs.

    Args:
        halves: the plan's.
        binding: of the plan's arguments, in their order.
        session: whose parameters.
    """
    slots = session.store.slots

    def run(*args: Any) -> Sequence[Any]:
        if halves.backward is not None and torch.is_grad_enabled():
            made: Sequence[Any] = CompiledFunctionOfPlan.apply(halves, *args)  # type: ignore[no-untyped-call]
            return made
        return halves.run([*args])[0]

    parameters = {i: b.target for i, b in enumerate(binding) if b.kind is InputKind.param}
    attached_run = attached(run, parameters, session)

    def call(leaves: Sequence[Any]) -> Sequence[Any]:
        args = [
            slots[b.target].placeholder
            if b.kind is InputKind.param
            else halves.buffers(b.target)
            if b.kind is InputKind.buffer
            else leaves[int(b.target)]
            for b in binding
        ]
        found: Sequence[Any] = attached_run(*args)
        return found

    return call


MAX_CONSTANT_BYTES = 1 << 16
"""Bytes of a constant that is kept with a plan."""


def constant_text(constant: torch.Tensor) -> str | None:
    """The bytes of a small tensor in base64, its elements in order; None if it is large, or not on the processor."""
    if constant.layout is not torch.strided or constant.device.type != "cpu" or constant.nbytes > MAX_CONSTANT_BYTES:
        return None
    held = constant.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return base64.b64encode(bytes(held.tolist())).decode()


def constant_of(text: str, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor of such a text. Raises ValueError if it is none of that dtype and shape."""
    held = base64.b64decode(text, validate=True)
    if len(held) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(held)} bytes are no {dtype} of shape {tuple(shape)}")
    if not held:
        return torch.empty(list(shape), dtype=dtype)
    return torch.frombuffer(bytearray(held), dtype=dtype).reshape(list(shape))


def buffers_of(model: nn.Module) -> Callable[[str], torch.Tensor]:
    """The buffer of a name, as it is at each call."""
    modules = dict(model.named_modules())

    def buffer(name: str) -> torch.Tensor:
        owner, _, key = name.rpartition(".")
        found: torch.Tensor | None = modules[owner]._buffers[key]
        if found is None:
            raise KeyError(name)
        return found

    return buffer
