"""Questions to an engine, under the names that DeepSpeed's engine has for them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.ranks import Ranks
from zgraph.engine.config.keys import Offload, Zero
from zgraph.engine.config.read import Config
from zgraph.engine.counts import Counts
from zgraph.engine.loss_scale import LossScale
from zgraph.engine.undecided import Later
from zgraph.errors import UsageError
from zgraph.optim.twins import Stateful

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains


class Queries:
    """Questions that an engine answers."""

    module: nn.Module
    config: Config
    optimizer: Optimizer | None
    lr_scheduler: Any
    loss_scaler: LossScale
    ranks: Ranks
    accumulation: int
    global_steps: int
    micro_steps: int
    _norm: Later | None

    def _needs_optimizer(self, what: str) -> Optimizer:
        if self.optimizer is None:
            raise UsageError(f"engine.{what} needs an optimizer: name one in the configuration, or give optimizer=")
        return self.optimizer

    # --- the step ----------------------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """The 2-norm of all gradients in the last step, before they were clipped; None before the first."""
        return float(self._norm) if self._norm is not None else None

    def get_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self._needs_optimizer("get_lr").param_groups]

    def get_mom(self) -> list[Any]:
        """The betas of each group, or where it has none its momentum."""
        groups = self._needs_optimizer("get_mom").param_groups
        return [group["betas"] if "betas" in group else group.get("momentum", 0.0) for group in groups]

    @property
    def cur_scale(self) -> float:
        """The loss scale."""
        return self.loss_scaler.scale

    def gradient_clipping(self) -> float:
        """The norm that gradients are clipped to; 0 for none."""
        keys = self.config.keys
        own = keys.optimizer.max_grad_norm if keys.optimizer is not None else None
        return keys.gradient_clipping or own or 0.0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self.config.keys.zero_optimization.stage

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        return self.accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        """Rows of a micro-batch on one rank."""
        return self.config.micro_batch

    @property
    def elastic_state(self) -> dict[str, Stateful]:
        """Parts of the engine beside model and optimizer that a replica takes over when it joins an elastic job:
        `zgraph.elastic(engine.module, engine.optimizer, state=engine.elastic_state)`.
        """
        found: dict[str, Stateful] = {"counts": Counts(cast("Trains", self)), "scale": self.loss_scaler}
        return found if self.lr_scheduler is None else {**found, "schedule": self.lr_scheduler}

    def train_batch_size(self) -> int:
        """Rows of a step, of all ranks."""
        return self.config.micro_batch * self.accumulation * self.config.world_size

    def get_batch_info(self) -> tuple[int, int, int]:
        """Rows of a step, rows of a micro-batch on one rank, and micro-batches of a step."""
        return self.train_batch_size(), self.config.micro_batch, self.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change how many micro-batches a step has.

        Raises:
            UsageError: the rows are not those of whole micro-batches, or a step is under way.
        """
        rows = self.config.micro_batch * self.config.world_size
        if train_batch_size < 1 or train_batch_size % rows:
            raise UsageError(f"train_batch_size must be a multiple of {rows}, the rows of a micro-batch of all ranks")
        if self.micro_steps % self.accumulation:
            raise UsageError("a step is under way: change the batch size after it")
        self.accumulation = train_batch_size // rows
        self.micro_steps = 0

    @property
    def global_samples(self) -> int:
        """Rows of all ranks in the steps so far."""
        return self.global_steps * self.train_batch_size()

    @property
    def device(self) -> torch.device:
        """Where the model computes, and where batches go."""
        return compiled_model(self.module).session.device

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.config.num_ranks

    @property
    def dp_world_size(self) -> int:
        """Ranks that each have a batch of their own."""
        return self.config.world_size

    def get_data_parallel_rank(self) -> int:
        """This rank's number among those that each have a batch of their own."""
        return compiled_model(self.module).session.store.ranks.batch_rank

    def get_tensor_parallel_rank(self) -> int:
        """This rank's number among those that compute every op together."""
        return compiled_model(self.module).session.store.ranks.rank_along("tensor")

    def get_sequence_parallel_rank(self) -> int:
        """This rank's number among those that share each sequence."""
        return compiled_model(self.module).session.store.ranks.rank_along("context")

    def get_model_parallel_rank(self) -> int:
        """The same: there is no pipeline."""
        return self.get_tensor_parallel_rank()

    @property
    def is_compiled(self) -> bool:
        """True: `zgraph.initialize` has compiled the model."""
        return True

    @property
    def global_rank(self) -> int:
        """This rank's number among all."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        """This rank's number on its host, as the launcher gave it."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def fp16_enabled(self) -> bool:
        return self.config.keys.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        return self.config.keys.bf16.enabled

    # --- the configuration -------------------------------------------------------------------------------------------

    @property
    def _zero(self) -> Zero:
        return self.config.keys.zero_optimization

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded as they are made: stages 2 and 3."""
        return self._zero.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded during the step: stage 3."""
        return self._zero.stage == 3

    def zero_offload_optimizer(self) -> Offload:
        """The section `offload_optimizer`."""
        return self._zero.offload_optimizer

    def zero_offload_param(self) -> Offload:
        """The section `offload_param`."""
        return self._zero.offload_param

    def zero_cpu_offload(self) -> bool:
        """Whether the optimizer's state is in the host's memory."""
        return self._zero.offload_optimizer.device == "cpu"

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether `save_16bit_model` gathers the model at stage 3."""
        return self._zero.stage3_gather_16bit_weights_on_model_save

    def zero_hpz_partition_size(self) -> int:
        """Ranks that share a set of shards; 1 for all of them."""
        return self._zero.zero_hpz_partition_size

    @property
    def communication_data_type(self) -> str | None:
        """The dtype that gradients are averaged in; None for the one that they come in."""
        return self.config.keys.communication_data_type

    def optimizer_name(self) -> str | None:
        """The type of the configuration's optimizer; None if it names none."""
        found = self.config.keys.optimizer
        return found.type.lower() if found is not None else None

    def optimizer_params(self) -> dict[str, Any] | None:
        """The parameters of the configuration's optimizer; None if it names none."""
        found = self.config.keys.optimizer
        return found.params if found is not None else None

    def scheduler_name(self) -> str | None:
        """The type of the configuration's scheduler; None if it names none."""
        found = self.config.keys.scheduler
        return found.type if found is not None else None

    def scheduler_params(self) -> dict[str, Any] | None:
        """The parameters of the configuration's scheduler; None if it names none."""
        found = self.config.keys.scheduler
        return found.params if found is not None else None

    def loss_scale(self) -> float:
        """The fixed loss scale; 0 where it follows overflows. `cur_scale` is the one at hand."""
        return self.config.keys.fp16.loss_scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale follows overflows."""
        return not self.loss_scaler.is_static

    def initial_dynamic_scale(self) -> float:
        """The first loss scale of those that follow overflows."""
        return float(2**self.config.keys.fp16.initial_scale_power)

    def steps_per_print(self) -> int | None:
        """Steps between two prints; None if the configuration does not say."""
        return self.config.keys.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether the times of a step are printed."""
        return self.config.keys.wall_clock_breakdown

    def dataloader_drop_last(self) -> bool:
        """Whether the loader leaves out a last batch that is smaller."""
        return self.config.keys.dataloader_drop_last
