"""`deepspeed.zero`: models built for stage 3, and parameters that are whole for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_runtime
from zgraph.deepspeed.absent import finder
from zgraph.engine.checkpoint.tensors import fill, gathered, part_of
from zgraph.engine.initialize import init_distributed
from zgraph.errors import UsageError
from zgraph.optim.runs import local
from zgraph.runtime.shards import ShardStore, Slot, slots_at_rest

log = logging.getLogger("zgraph")

_WHOLE = "leave it out: a compiled forward gathers whatever parameters it reads"

__getattr__ = finder(
    __name__,
    {
        "register_external_parameter": _WHOLE,
        "unregister_external_parameter": _WHOLE,
        "DeepSpeedZeRoOffload": "give offload_param in the configuration",
        "TiledLinear": "take torch.nn.Linear: a memory budget decides what is alive at once",
        "TiledLinearReturnBias": "take torch.nn.Linear: a memory budget decides what is alive at once",
        "unwrap_model_for_generation": "call zgraph.gathered(model), which gathers it for a while",
        "ZeroParamStatus": "ask isinstance(parameter, torch.distributed.tensor.DTensor)",
        "ZeroParamType": "ask isinstance(parameter, torch.distributed.tensor.DTensor)",
        "MiCS_Init": "leave it out: `zero_hpz_partition_size` shards over fewer ranks",
    },
)


class Init:
    """Context in which a model is built that `initialize` shards. It joins the ranks, and leaves the model as it is.

    The model is built whole on each rank, in the dtype of its masters, and sharded afterwards, one parameter after the
    other. Under `torch.device("meta")` it is built without memory instead.

    Args:
        enabled: False does nothing.
        module, mem_efficient_linear, pin_memory, config_dict_or_path, config, dtype: taken as DeepSpeed does, without
            effect: what they say is in the configuration of `initialize`.
        remote_device: None, "cpu" or "none".
        refused: what else DeepSpeed takes; it must ask for nothing.

    Raises:
        UsageError: it asks for what zgraph does not have.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **refused: Any,
    ) -> None:
        if not enabled:
            return
        if data_parallel_group is not None or mpu is not None:
            raise UsageError("zero.Init: give mesh= to initialize in the place of a group")
        if remote_device not in (None, "cpu", "none"):
            raise UsageError(
                f'zero.Init: remote_device={remote_device!r}: give offload_param {{"device": "cpu"}} instead'
            )
        if asked := [name for name, value in refused.items() if value not in (None, False)]:
            raise UsageError(f"zero.Init: zgraph does not have {', '.join(asked)}; leave it out")
        init_distributed()
        if not dist.is_initialized() or dist.get_rank() == 0:
            _say_what_it_does()

    def __enter__(self) -> Init:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@cache
def _say_what_it_does() -> None:
    log.warning(
        'zero.Init has no effect: the model is built whole, and initialize shards it; torch.device("meta") builds it '
        "without memory"
    )


@contextmanager
def GatheredParameters(
    params: torch.Tensor | Iterable[torch.Tensor],
    modifier_rank: int | None = None,
    fwd_module: Any = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Context in which parameters are whole on every rank. All ranks enter and leave it together.

    The model's attributes are plain parameters there, in the masters' dtype; the parameters that were given are
    DTensors of the same memory, of which each rank has all. The model is not called in there.

    Args:
        params: a parameter, or several.
        modifier_rank: the rank, among all, whose values every rank takes in the end; needed where they are changed.
        fwd_module: taken, and not needed.
        enabled: False does nothing.

    Raises:
        UsageError: something else than parameters was given, or they were changed without a modifier_rank; these
            changes are lost.
    """
    if not enabled:
        yield
        return
    given = [params] if isinstance(params, torch.Tensor) else [*params]
    if any(not isinstance(p, torch.Tensor) for p in given):
        raise UsageError("GatheredParameters takes a parameter or several: give module.parameters(), say")
    known, unique = slots_at_rest(), {id(p): p for p in given}
    loans = [_Loan(p, *known.get(key, (None, None))) for key, p in unique.items()]
    with ExitStack() as stack:
        for loan in loans:
            stack.enter_context(loan.lent())
        yield
    if modifier_rank is None and any(loan.was_changed for loan in loans):
        raise UsageError("parameters were changed: GatheredParameters(..., modifier_rank=0) keeps what that rank wrote")
    if modifier_rank is not None:
        for loan in loans:
            loan.take_back(modifier_rank)


class _Loan:
    """A parameter that is whole for a while.

    Args:
        parameter: at rest; of a compiled model, or of one that is not compiled yet.
        store, slot: where the first kind lies.
    """

    def __init__(self, parameter: torch.Tensor, store: ShardStore | None, slot: Slot | None) -> None:
        self.parameter, self.store, self.slot = parameter, store, slot
        self.group = store.group if store is not None else None
        self.is_shared = dist.is_initialized() if store is None else store.num_ranks > 1
        self.whole = gathered(parameter)
        self.version = self.whole._version

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The parameter, whole wherever the model holds it."""
        if self.store is None or self.slot is None or not isinstance(self.parameter, DTensor):
            yield
            return
        held = nn.Parameter(self.whole, self.parameter.requires_grad)
        before, self.store.is_lent = self.store.is_lent, True
        try:
            with private_runtime.held_whole(self.parameter, self.whole), self.store.held_as([self.slot], [held]):
                yield
        finally:
            self.store.is_lent = before

    @property
    def was_changed(self) -> bool:
        """Whether this rank has written to it, as far as its own part and the count of writes tell."""
        if not self.is_shared:
            return False
        rest, part = local(self.parameter), part_of(self.whole, self.parameter)
        return self.whole._version != self.version or not _same_bytes(rest, part.to(rest.device))

    @torch.no_grad()
    def take_back(self, rank: int) -> None:
        """Keep the values of a rank."""
        if self.is_shared:
            dist.broadcast(self.whole, rank, self.group)
        if isinstance(self.parameter, DTensor):
            fill(self.parameter, self.whole)
        private_runtime.bump_version([self.parameter])


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one.detach(), other)))
