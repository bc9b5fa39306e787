"""The private corners of torch that the runtime needs, in one place. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import profiler
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

__all__ = [
    "Messenger",
    "PrefixStore",
    "Store",
    "abort_groups",
    "accumulator",
    "all_gathers",
    "bump_version",
    "default_pg_timeout",
    "direct",
    "dtensor",
    "dtensor_like",
    "dtensor_parameter",
    "exact_items",
    "fused_adamw",
    "fused_sgd",
    "grad_hooks",
    "has_averages",
    "has_fused_sgd",
    "held_whole",
    "init_group",
    "is_profiling",
    "joined",
    "keeps_graph",
    "messenger",
    "new_store",
    "reduce_scatters",
    "store",
    "whole_group",
    "will_accumulate",
]

_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Where each result goes, and what this rank gives for it."""


def all_gathers(pairs: Pairs, group: dist.ProcessGroup) -> dist.Work:
    """Begin to gather equal parts of one tensor or more, in one call: named single since torch 2.13."""
    if len(pairs) == 1:
        return _gather(*pairs[0], group=group, async_op=True)
    grouped: Any = group
    together = getattr(grouped, "all_gather_single_coalesced", None) or grouped.allgather_into_tensor_coalesced
    made: dist.Work = together([out for out, _ in pairs], [own for _, own in pairs])
    return made


Ops = tuple[dist.ReduceOp.RedOpType, dist.ReduceOp.RedOpType]
MEANS: Ops = (dist.ReduceOp.AVG, dist.ReduceOp.AVG)


def reduce_scatters(
    pairs: Pairs, group: dist.ProcessGroup, copies: dist.ProcessGroup | None, ops: Ops = MEANS
) -> dist.Work:
    """Begin to reduce and scatter equal parts of one tensor or more, in one call, then over the holders of copies.

    Args:
        pairs: what goes where.
        group: the ranks that keep a part each.
        copies: the ranks that keep the same part; None where this is the only one.
        ops: sum or mean over the first, and over the second.
    """
    if len(pairs) == 1:
        work = _scatter(*pairs[0], op=ops[0], group=group, async_op=True)
    else:
        grouped: Any = group
        together = getattr(grouped, "reduce_scatter_single_coalesced", None) or grouped.reduce_scatter_tensor_coalesced
        options = dist.ReduceScatterOptions()
        options.reduceOp = cast(Any, ops[0])
        work = cast(dist.Work, together([out for out, _ in pairs], [whole for _, whole in pairs], options))
    if copies is None:
        return work
    # the second step waits for the first on a separate stream, so that computing waits for neither
    with torch.cuda.stream(_side_stream(pairs[0][0].device)):
        work.wait()
        works = [dist.all_reduce(out, ops[1], group=copies, async_op=True) for out, _ in pairs]
    last: dist.Work = works[-1]
    return last


def has_averages(group: dist.ProcessGroup) -> bool:
    """Whether a group's collectives take a mean, without a pass to divide: NCCL's do."""
    return "nccl" in str(dist.get_backend(group))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def dtensor(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: Sequence[int]
) -> DTensor:
    """A DTensor over this rank's part, which may be in the host's memory though the mesh is of GPUs.

    The DTensor's own, empty storage begins at 0 wherever the part is in a flat buffer: torch.save, pickle and deepcopy
    refuse one that does not.
    """
    made = _shell(local, mesh, placements, shape, stride)
    made._local_tensor = local
    return made


def dtensor_parameter(
    local: torch.Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: torch.Size,
    stride: Sequence[int],
    *,
    requires_grad: bool,
) -> nn.Parameter:
    """A parameter that is a DTensor: see `dtensor`."""
    made: Any = nn.Parameter(_shell(local, mesh, placements, shape, stride), requires_grad)
    made._local_tensor = local
    return cast(nn.Parameter, made)


def _shell(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size, stride: Sequence[int]
) -> DTensor:
    """A DTensor over memory of its own, without any."""
    return _of_spec(local, DTensorSpec(mesh, tuple(placements), TensorMeta(shape, tuple(stride), local.dtype)))


def _of_spec(local: torch.Tensor, spec: DTensorSpec) -> DTensor:
    made: DTensor = DTensor(_empty(local.dtype, local.device), spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=dtype, device=device)


def dtensor_like(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor over this rank's part, sharded as `like` is. They share a spec, which takes long to make."""
    if local.dtype != like.dtype:
        return dtensor(local, like.device_mesh, like.placements, like.shape, like.stride())
    made = _of_spec(local, like._spec)
    made._local_tensor = local
    return made


@contextmanager
def held_whole(sharded: DTensor, whole: torch.Tensor) -> Iterator[None]:
    """Context in which each rank's part of a DTensor is the whole of it."""
    held: Any = sharded
    local, spec = held._local_tensor, held._spec
    held._local_tensor = whole
    held._spec = DTensorSpec(spec.mesh, (Replicate(),) * spec.mesh.ndim, spec.tensor_meta)
    try:
        yield
    finally:
        held._local_tensor, held._spec = local, spec


def exact_items() -> None:
    """Have `float(t)` and `t.item()` of a DTensor ask all ranks, as for norms and sums over shards.

    torch gives this rank's part of it, a wrong number without a word. All ranks must ask for the number.
    """
    handlers = cast(dict[Any, Any], DTensor._op_dispatcher._custom_op_handlers)
    handlers[torch.ops.aten._local_scalar_dense.default] = _reduced_item


def _reduced_item(_op: Any, args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> Any:
    number = args[0]
    if not all(placement.is_replicate() for placement in number.placements):
        number = number.redistribute(placements=[Replicate()] * number.device_mesh.ndim)
    return number._local_tensor.item()


JOIN_S = 30.0
"""How long ranks that all live wait for one another to join; one that was killed just before never comes."""


def init_group(backend: str, store: Store, rank: int, num_ranks: int, timeout: timedelta | None) -> None:
    """The default group. Over gloo, whose ranks connect at once, joining has a separate limit.

    NCCL is told which GPU is this rank's: it connects at once too, so that what is wrong shows here and not within the
    first step; groups of some of the ranks split off from it; and a barrier knows which device to wait for.
    """
    is_gloo = backend == "gloo"
    limit = timedelta(seconds=JOIN_S) if is_gloo else timeout
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=limit, device_id=device)
    if is_gloo:
        dist.distributed_c10d._set_pg_timeout(timeout or default_pg_timeout)


def joined(ranks: list[int], name: str, timeout: timedelta = default_pg_timeout) -> dist.ProcessGroup:
    """A new group of these ranks over gloo, whose joining has a limit, and whose collectives another.

    Only these ranks call it, where `torch.distributed.new_group` wants all; there the name would be made of what each
    rank has made before, so that ranks of several meshes would wait under different ones.

    Args:
        ranks: global ones, in their order; this one is among them.
        name: the same on all of them, and used for no other group.
        timeout: of its collectives; torch's own by default.
    """
    c10d, rank = dist.distributed_c10d, dist.get_rank()
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(rank),
        ranks,
        dist.Backend("gloo"),
        store(),
        c10d.GroupName(name),
        timeout=timedelta(seconds=JOIN_S),
    )
    c10d._world.pg_group_ranks[group] = {found: at for at, found in enumerate(ranks)}
    c10d._set_pg_timeout(timeout, group)
    return cast(dist.ProcessGroup, group)


def abort_groups(rank: int) -> None:
    """End what is under way in all groups of this process that a rank is in: what waits for it returns, or raises.

    They stay known to torch.distributed, unlike after its own `_abort_process_group`: another thread may be using them.
    NCCL's end together, as they would wait for one another. Backends that cannot do so (gloo) go on.
    """
    c10d: Any = dist.distributed_c10d
    world = c10d._world
    groups = [group for group in list(world.pg_map) if rank in world.pg_group_ranks.get(group, {})]
    backends = [found for group in groups if (found := _gpu_backend(group)) is not None]
    if backends:
        backends[0]._group_start()
    for group in groups:
        with suppress(RuntimeError):
            group.abort()
    if backends:
        backends[0]._group_end()


def _gpu_backend(group: Any) -> Any:
    """A group's backend for GPUs, if it is NCCL's."""
    try:
        backend = group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return None
    return backend if hasattr(backend, "_group_start") else None


def whole_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of a mesh, in their order."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return cast(dist.ProcessGroup, dist.group.WORLD)
    return mesh._flatten().get_group()


def store() -> Store:
    """The key-value store that the processes of this job met in."""
    return _get_default_store()


def new_store(host: str) -> tuple[Store, int]:
    """A store that this process keeps for the ranks of a job, and its port."""
    found = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    return found, found.port


class Messenger(Protocol):
    """Methods of a gloo group beside its collectives; torch's stubs leave them out."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work: ...


def messenger(store: Store, name: str, rank: int, num_ranks: int, timeout: timedelta) -> Messenger:
    """A separate gloo group, with connections between all its ranks."""
    group = dist.ProcessGroupGloo(PrefixStore(name, store), rank, num_ranks, timeout)
    return cast(Messenger, group)


Tensors = Sequence[torch.Tensor]


def fused_adamw(
    parameters: Tensors,
    gradients: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    step: torch.Tensor,
    found_inf: torch.Tensor | None = None,
    **options: float,
) -> None:
    """AdamW's update of many in place, by torch's fused kernel; `step` is the number of the step that this is.

    Nothing changes where `found_inf` is 1.
    """
    torch._fused_adamw_(
        list(parameters),
        list(gradients),
        list(firsts),
        list(seconds),
        [],
        [step] * len(parameters),
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=found_inf,
        **options,
    )


def has_fused_sgd(parameter: torch.Tensor) -> bool:
    """Whether torch's fused kernel is right there: on processors it is wrong in bfloat16 and float16 (torch 2.13)."""
    return parameter.is_cuda or parameter.dtype in (torch.float32, torch.float64)


def fused_sgd(parameters: Tensors, gradients: Tensors, directions: Tensors, **options: Any) -> None:
    """The update of stochastic gradient descent of many in place, by torch's fused kernel."""
    torch._fused_sgd_(
        list(parameters), list(gradients), list(directions), maximize=False, grad_scale=None, found_inf=None, **options
    )


def bump_version(tensors: Tensors) -> None:
    """Tell autograd, and who else looks, that memory of these tensors was written to."""
    torch.autograd.graph.increment_version(tensors)


def direct(op: Callable[..., Any]) -> Callable[..., Any]:
    """Callable behind an ATen op, without the Python frame around it."""
    inner: Callable[..., Any] = getattr(op, "_op", op)
    return inner


def keeps_graph() -> bool:
    """Whether the backward that runs now was called with retain_graph=True."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def is_profiling() -> bool:
    """Whether `torch.profiler` is on."""
    return profiler._is_profiler_enabled


def grad_hooks(parameter: torch.Tensor) -> dict[int, Callable[[torch.Tensor], None]]:
    """The hooks that `register_post_accumulate_grad_hook` registered; autograd runs those in it."""
    return parameter._post_accumulate_grad_hooks or {}


def accumulator(parameter: torch.Tensor) -> Any:
    """The autograd node that adds to the `.grad` of a parameter."""
    return torch.autograd.graph.get_gradient_edge(parameter).node


def will_accumulate(node: Any) -> bool:
    """Whether the backward that runs now adds to the `.grad` behind an accumulator: it was called for all leaves, or
    `inputs=` names this one. `autograd.grad` adds to none.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of a leaf that autograd.grad was asked for
        return False
