"""An Accelerator that compiles the models it prepares, as a file of `accelerate config` says."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import accelerate
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from zgraph import api
from zgraph.engine.checkpoint.tensors import whole_state_dict
from zgraph.engine.config.optimizers import handed_over
from zgraph.errors import ConfigError, UsageError
from zgraph.hf.accelerators import own, refuse_saving
from zgraph.hf.config import folded
from zgraph.hf.data_ranks import by_data_ranks
from zgraph.hf.fsdp_keys import FromFile, from_file
from zgraph.hf.parallelism import by_parallelism_config, unseen
from zgraph.options.validate import ATTRIBUTE

log = logging.getLogger("zgraph")

DTYPES = {"no": None, "bf16": torch.bfloat16}


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """`accelerate.Accelerator` whose `prepare` compiles. `accelerate launch` hands it the keys of `fsdp_config`.

    Optimizers that were made before take the sharded parameters. Without a file it is stage 3. Where ranks compute
    together, its loaders give them the same rows, and `gather` has these once.

    Args:
        args, kwargs: as accelerate's takes them; no plugins of FSDP, DeepSpeed or Megatron.
        mixed_precision: "no" or "bf16"; by default what the file says.
        parallelism_config: accelerate's `ParallelismConfig`: ranks that compute together; by default the file's.
        zgraph: options of `zgraph.compile`, which go before those of the file.

    Raises:
        ConfigError: the file asks for what zgraph does not have; the error has all problems.
        UsageError: an argument does.
    """

    def __init__(
        self,
        *args: Any,
        mixed_precision: str | None = None,
        parallelism_config: Any = None,
        zgraph: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if plugins := [name for name, value in kwargs.items() if value is not None and _replaces(name)]:
            raise UsageError(
                f"{', '.join(plugins)}: zgraph shards and compiles; leave it out, and give zgraph= options"
            )
        self.from_file: FromFile = from_file(os.environ)
        asked = str(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        if asked not in DTYPES:
            raise UsageError(f'mixed_precision={asked!r}: a compiled model takes "bf16" or "no"')
        self.param_dtype, self.zgraph_options = DTYPES[asked], dict(zgraph or {})
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # else accelerate and transformers do what zgraph does
        with unseen():
            super().__init__(*args, mixed_precision="no", **kwargs)
        asked_together = by_parallelism_config(parallelism_config, self.num_processes)
        self.from_file = self.from_file.along(asked_together)
        options = {**self.from_file.options, **self.zgraph_options}
        alike = math.prod(options.get(f"{axis}_parallel", 1) for axis in ("tensor", "context"))
        if alike > 1 and self.from_file.is_hybrid:
            raise ConfigError(
                ["fsdp_sharding_strategy: where ranks compute together, all others shard; choose FULL_SHARD"]
            )
        by_data_ranks(self, alike)
        self.register_save_state_pre_hook(refuse_saving)
        if self.from_file.notes and self.is_main_process:
            log.warning("without effect under zgraph: %s", folded(self.from_file.notes))

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As accelerate's, with models compiled.

        Raises:
            UsageError: an option means nothing, or an optimizer's parameters are no model's.
        """
        models = [each for each in args if isinstance(each, nn.Module)]
        optimizers = [each for each in args if isinstance(each, Optimizer)]
        for model in models:
            if ATTRIBUTE not in model.__dict__:
                self._compile(model, [o for o in optimizers if _is_of(o, model)])
            own(model)
        return super().prepare(*args, device_placement=device_placement)

    def _compile(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        own_options = {"mesh": self._mesh(), "device": self.device, "param_dtype": self.param_dtype}
        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(handed_over(optimizer, model))
            api.compile(model, **{**own_options, **self.from_file.options, **self.zgraph_options})

    def _mesh(self) -> DeviceMesh | None:
        """Hosts that have copies, of ranks that shard, if that is asked for and there are several hosts."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or self.num_processes)
        if self.from_file.num_copies > 1:
            here = self.num_processes // self.from_file.num_copies
        elif not self.from_file.is_hybrid or here == self.num_processes:
            return None
        names = ("replicate", "shard")
        return init_device_mesh(self.device.type, (self.num_processes // here, here), mesh_dim_names=names)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """The whole weights, on the first rank. All ranks call it."""
        if ATTRIBUTE not in model.__dict__:
            return super().get_state_dict(model, unwrap=unwrap)
        return whole_state_dict(model, keep=self.is_main_process)


def _replaces(argument: str) -> bool:
    """Whether an argument of accelerate's asks for what zgraph does."""
    kinds = ("fsdp_", "deepspeed_", "megatron_", "torch_tp_", "dynamo_")
    return argument.startswith(kinds)


def _is_of(optimizer: Optimizer, model: nn.Module) -> bool:
    mine = {id(p) for p in model.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
