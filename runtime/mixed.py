"""Ops outside of the compiled model in which a shard meets a plain tensor: right, or refused with the remedy.

A plain tensor is this rank's own; a DTensor is all ranks' together. What they make of each other is clear in three
cases. torch itself takes a plain number for the same on all ranks. The others are here:

- A number made of DTensors, as a penalty on weights, becomes plain where it meets a plain tensor. Its gradient is the
  ranks' mean, as that of a parameter is.
- Element by element, within a backward or in place, a plain tensor stands for the same on all ranks: a mask on a
  gradient, values for a parameter. This rank takes its part of it.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from zgraph.bridge import private_blocks, private_dtensor
from zgraph.bridge.private_runtime import dtensor, dtensor_like, exact_items, whole_group
from zgraph.errors import ShardError
from zgraph.runtime.advice import advice
from zgraph.runtime.foreign_shards import refuse_shards

Op = Callable[..., Any]
_ATEN: Any = torch.ops.aten
_WHOLE = "call .full_tensor() of it first, on every rank"

_MESHES: list[DeviceMesh] = []
"""Those that models are sharded over: DTensors of others are for torch alone."""


def _overloads(*names: str) -> tuple[Op, ...]:
    found = (name.partition(".") for name in names)
    return tuple(getattr(getattr(_ATEN, op), overload or "default") for op, _, overload in found)


IN_PLACE = _overloads(
    *("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "copy_", "zero_", "fill_.Scalar", "fill_.Tensor"),
    *("masked_fill_.Scalar", "masked_fill_.Tensor", "clamp_", "normal_", "uniform_", "index_put_"),
)
POINTWISE = _overloads(
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum", "minimum", "where.self"),
    *("masked_fill.Scalar", "masked_fill.Tensor", "eq.Tensor", "ne.Tensor", "lt.Tensor", "gt.Tensor"),
)
LAYERS = _overloads(
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "embedding", "native_layer_norm", "native_group_norm"),
    *("native_batch_norm", "_fused_rms_norm", "linear", "matmul", "prelu", "index_select", "gather", "index.Tensor"),
)
OTHERS = _overloads("cat", "stack", "mse_loss", "nll_loss_forward", "nll_loss_backward", "mse_loss_backward")
_VALUES_IN_PLACE = frozenset(IN_PLACE)
_ELEMENTWISE = frozenset((*IN_PLACE, *POINTWISE))
_LAYERS = frozenset(LAYERS)
_ADDS = frozenset(_overloads("add_.Tensor", "sub_.Tensor"))
_DRAWN = frozenset(_overloads("normal_", "uniform_", "index_put_"))
"""Ops in place that are another on a part: random numbers are drawn for the whole, and places are counted in it."""


def take_part(mesh: DeviceMesh) -> None:
    """Watch ops over DTensors of a mesh that a model is sharded over."""
    if mesh not in _MESHES:
        _MESHES.append(mesh)
    _install()


@cache
def _install() -> None:
    exact_items()
    private_blocks.install()
    private_dtensor.watch((*IN_PLACE, *POINTWISE, *LAYERS, *OTHERS), _run)
    private_dtensor.propagation_errors(_converted)
    for name in ("numpy", "tolist", "storage"):
        private_dtensor.method(name, _of_whole(name))
    refuse_shards()


def _run(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any], as_torch_does: Callable[[], Any]) -> Any:
    """Run an op over DTensors and perhaps plain tensors.

    Raises:
        ShardError: it means nothing, or would be written to a copy.
    """
    tensors = [*_tensors((*args, *kwargs.values()))]
    shards = [t for t in tensors if isinstance(t, DTensor)]
    if shards[0].device_mesh not in _MESHES:
        return as_torch_does()
    written = args[0] if op in _VALUES_IN_PLACE else None
    if isinstance(written, DTensor) and private_dtensor.is_lost(written):
        raise ShardError(
            f"{_named(op)} writes to rows of a shard{_where()}, which torch does to a copy of them: nothing would "
            "change. Change the whole on every rank: `whole = p.full_tensor(); whole[0] = 0; p.copy_(whole)`, under "
            "torch.no_grad()"
        )
    plain = [t for t in tensors if not isinstance(t, DTensor)]
    if len(shards) == len(tensors) or (written is not None and isinstance(written, DTensor) and _is_number(plain)):
        if isinstance(written, DTensor) and op not in _DRAWN and _can_be_alike(op, written, shards):
            return _on_parts(op, args, kwargs, written)
        return as_torch_does()
    if all(t.dim() == 0 for t in shards):
        return op(*_with(args, _number), **{key: _with(value, _number) for key, value in kwargs.items()})
    if _is_number(plain) and (written is None or isinstance(written, DTensor)):
        return as_torch_does()
    return _spread(op, args, kwargs, tensors, shards, written)


def _spread(
    op: Op,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: list[torch.Tensor],
    shards: list[DTensor],
    written: Any,
) -> Any:
    """Run an op element by element, with this rank's parts of plain tensors. Raises ShardError for any other."""
    is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    is_placed = isinstance(written, DTensor) or (written is None and private_dtensor.graph_task() >= 0)
    largest = max(shards, key=torch.Tensor.numel)
    takes = _is_mask(args, largest) if op is _ATEN.index_put_.default else op in _ELEMENTWISE
    if is_recorded or not is_placed or not takes or not _fits(tensors, largest):
        raise ShardError(f"{_named(op)} of a shard and a plain tensor{_where()}: {_remedy(op, written)}")

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor) or tensor.numel() == 1:
            return tensor
        whole = tensor.detach().expand(largest.shape)
        local = private_dtensor.placed_as(whole, largest).to(largest._local_tensor.device)
        return dtensor_like(local, largest)

    if op is _ATEN.index_put_.default:
        (mask,), value = args[1], args[2]
        local = private_dtensor.placed_as(mask, largest).to(largest._local_tensor.device)
        largest._local_tensor.masked_fill_(local, value._local_tensor if isinstance(value, DTensor) else value)
        return written
    return op(*_with(args, placed), **{key: _with(value, placed) for key, value in kwargs.items()})


def _fits(tensors: list[torch.Tensor], largest: DTensor) -> bool:
    """Whether plain tensors are numbers, or broadcast to the largest DTensor, which is not a pending sum."""
    if any(p.is_partial() for p in largest.placements):
        return False
    try:
        return all(t.expand(largest.shape) is not None for t in tensors if not isinstance(t, DTensor))
    except RuntimeError:
        return False


def _is_mask(args: tuple[Any, ...], largest: DTensor) -> bool:
    """Whether an assignment by index is of one number, to where a mask as large as the DTensor is true."""
    indices, value = args[1], args[2]
    is_mask = len(indices) == 1 and indices[0].dtype == torch.bool and indices[0].shape == largest.shape
    return is_mask and not isinstance(indices[0], DTensor) and value.numel() == 1


def _number(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor without dims as a plain number, whose gradient is averaged over the ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    if torch.is_grad_enabled() and tensor.requires_grad and not hasattr(tensor, "zgraph_averages"):
        tensor.zgraph_averages = True  # type: ignore[attr-defined]
        tensor.register_hook(lambda gradient: _averaged(gradient, mesh))  # type: ignore[no-untyped-call]
    detached: Any = tensor.detach()
    return cast(torch.Tensor, detached.redistribute(placements=[Replicate()] * mesh.ndim)._local_tensor)


def _averaged(gradient: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A plain gradient as the ranks' mean, a DTensor."""
    if isinstance(gradient, DTensor):
        return gradient
    mean = gradient / mesh.size()
    dist.all_reduce(mean, group=whole_group(mesh))
    return dtensor(mean, mesh, [Replicate()] * mesh.ndim, mean.shape, mean.stride())


def _on_parts(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: DTensor) -> DTensor:
    """Run an op in place on this rank's parts, those of other DTensors placed as the one that is written to."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        placed: Any = tensor.detach()
        if tensor.placements != written.placements:
            placed = placed.redistribute(placements=written.placements)
        return cast(torch.Tensor, placed._local_tensor)

    op(*_with(args, part), **kwargs)
    return written


def _can_be_alike(op: Op, written: DTensor, shards: list[DTensor]) -> bool:
    """Whether an op in place on this rank's parts is one on the whole; of a pending sum, adding to it is."""
    if any(p.is_partial() for p in written.placements) and (len(shards) < 2 or op not in _ADDS):
        return False
    return all(s.shape == written.shape and s.device_mesh == written.device_mesh for s in shards)


def _is_number(plain: list[torch.Tensor]) -> bool:
    """Whether torch takes these plain tensors for the same on all ranks."""
    return all(t.numel() == 1 for t in plain)


def _tensors(values: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(tuple(value))


def _with(value: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Arguments of an op, with another tensor for each."""
    if isinstance(value, torch.Tensor):
        return made(value)
    return type(value)(_with(v, made) for v in value) if type(value) in (list, tuple) else value


def _remedy(op: Op, written: Any) -> str:
    if op in _LAYERS:
        return (
            "the parameters of a compiled model are shards. Run the model by calling it, and another method or a part "
            "of it within `with zgraph.gathered(model):`"
        )
    if written is not None and not isinstance(written, DTensor):
        return f"a shard is not the whole parameter: {_WHOLE}"
    return (
        "the parameters and gradients of a compiled model are shards, and a plain tensor may be another on each rank: "
        f"{_WHOLE}. In place, as in `p.grad.mul_(mask)` under torch.no_grad(), one of the shard's shape is taken"
    )


def _converted(error: Exception) -> Exception:
    """An error of torch's for an op that it does not run over shards, with the remedy."""
    remedy = advice(error).removeprefix("zgraph: ").rstrip(".")
    if isinstance(error, ShardError) or not remedy:
        return error
    return ShardError(f"{str(error).partition(chr(10))[0].rstrip('.')}{_where()}: {remedy}")


def _of_whole(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method that needs all of a tensor in this process."""

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def of_whole(self: DTensor, *args: Any, **kwargs: Any) -> Any:
            if self.device_mesh not in _MESHES:
                return own(self, *args, **kwargs)
            if name != "storage" and all(p.is_replicate() for p in self.placements):
                if self.requires_grad:
                    return own(self, *args, **kwargs)
                return getattr(self._local_tensor, name)(*args, **kwargs)
            raise ShardError(f".{name}() of a shard{_where()}: {_WHOLE}")

        return of_whole

    return make


def _named(op: Op) -> str:
    return str(op).removesuffix(".default")


def _where() -> str:
    """The user's line that this thread runs, in words."""
    frame = sys._getframe(1)
    while frame is not None:
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("zgraph.", "torch.", "torch_", "safetensors.")) and "/torch/" not in file:
            line = linecache.getline(file, frame.f_lineno).strip()
            return f" ({Path(file).name}:{frame.f_lineno}{f': {line}' if line else ''})"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""
