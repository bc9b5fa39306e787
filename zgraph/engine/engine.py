"""A model, its optimizer and its schedule behind one object: DeepSpeed's engine, wired to the compiler."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from zgraph.api import no_sync
from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.absent import ABSENT
from zgraph.engine.checkpoint.checkpoint import Checkpoints, Parts
from zgraph.engine.checkpoint.export import export, save_16bit
from zgraph.engine.checkpoint.ranks import ranks_of
from zgraph.engine.config.read import Config
from zgraph.engine.data import EngineLoader
from zgraph.engine.gradients import Gradients
from zgraph.engine.loss_scale import LossScale
from zgraph.engine.monitor.monitor import Monitoring
from zgraph.engine.queries import Queries
from zgraph.engine.registry import register
from zgraph.engine.undecided import Later, Undecided, can_take_back, leaves_out
from zgraph.errors import AbsentError, UsageError
from zgraph.optim.adamw import AdamW
from zgraph.optim.elastic import reduce_among_replicas

log = logging.getLogger("zgraph")


class Engine(Queries):
    """Engine that `zgraph.initialize_engine` returns. Attributes that it does not have are those of the model; of
    methods that DeepSpeed's engine has and this one has not, AbsentError says what to do instead.

    Args:
        model: the compiled model.
        config: the configuration, read.
        optimizer: over the model's parameters; None for inference.
        scheduler: of the optimizer, stepped with it.
        loader: of the training data, if there is one.
    """

    def __init__(
        self, model: nn.Module, config: Config, optimizer: Optimizer | None, scheduler: Any, loader: EngineLoader | None
    ) -> None:
        self.module, self.config = model, config
        self.optimizer, self.lr_scheduler, self.training_dataloader = optimizer, scheduler, loader
        self.accumulation = config.accumulation
        self.loss_scaler = LossScale(config.keys.fp16)
        self.monitor = Monitoring(config, model)
        self.global_steps = self.micro_steps = self._skipped_steps = 0
        self.pending = 0
        self.awaits_step = self._is_local = self._was_applied = False
        self._is_boundary: bool | None = None
        self._session = compiled_model(model).session
        self.ranks = ranks_of(self._session)
        self._checkpoints = Checkpoints(self)
        self._norm: Later | None = None
        self._undecided: Undecided | None = None
        register(self)

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        if name in ABSENT and (name == "compile" or not hasattr(self.module, name)):
            raise AbsentError(f"the engine has no {name}: {ABSENT[name]}")
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._syncing(), self.monitor.forward(args, kwargs):
            return self.module(*args, **kwargs)

    forward = __call__

    def train(self, mode: bool = True) -> Engine:
        """Put the model into training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Put the model into evaluation mode."""
        return self.train(False)

    # --- a step ------------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Add the gradients of a micro-batch: of its share in the mean of all micro-batches of a step.

        Args:
            loss: a scalar; the mean over the micro-batch.
            retain_graph: must be False: the step's memory is freed as the backward goes.
            scale_wrt_gas: False where the loss is the micro-batch's share already.

        Returns:
            The micro-batch's share of the loss, without its scale.

        Raises:
            UsageError: there is no optimizer, or the loss is no scalar.
        """
        if retain_graph:
            raise UsageError("retain_graph: the compiled backward frees what the forward kept; call the model again")
        scaled = self.scale(loss, scale_wrt_gas)
        try:
            with self._syncing(), self.monitor.backward(loss):
                torch.autograd.backward(scaled)
        except BaseException:
            self.awaits_step = False
            raise
        return loss.detach() / self.accumulation if scale_wrt_gas else loss

    def scale(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> torch.Tensor:
        """The loss to call `.backward()` on, in the place of `engine.backward(loss)`.

        The gradients of each micro-batch are then averaged over the ranks at once.

        Raises:
            UsageError: there is no optimizer, or the loss is no scalar.
        """
        self._needs_optimizer("backward")
        if loss.numel() != 1:
            raise UsageError(f"the loss must be one number, not a tensor of shape {tuple(loss.shape)}")
        self.awaits_step = True
        return loss.float() * (self.loss_scaler.scale / (self.accumulation if scale_wrt_gas else 1))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand is the last of its step."""
        if self._is_boundary is not None:
            return self._is_boundary
        return (self.micro_steps + 1) % self.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batches from here on are the last of their steps, instead of having them counted."""
        self._is_boundary = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do not average gradients over the ranks in here, whatever the micro-batch. `step` comes after it.

        Raises:
            UsageError: it is within another.
        """
        if self._is_local:
            raise UsageError("engine.no_sync within engine.no_sync: leave the inner one out")
        self._is_local = True
        try:
            yield
        finally:
            self._is_local = False

    def _syncing(self) -> contextlib.AbstractContextManager[None]:
        syncs = self.is_gradient_accumulation_boundary() and not self._is_local
        return contextlib.nullcontext() if syncs or not self.module.training else no_sync(self.module)

    def step(self) -> None:
        """End a micro-batch; the last of a step updates the parameters, and forgets the gradients.

        A step whose gradients are not finite on any rank is skipped on all: with `fp16`; with `bf16`, unless
        `check_grad_overflow` is false; and in fp32 where anything is sharded.

        Raises:
            UsageError: there is no optimizer, or it is under `no_sync`, or the gradients have no scale.
            FloatingPointError: gradients overflow at the smallest loss scale.
            PeerError: the ranks cannot go on.
        """
        optimizer = self._needs_optimizer("step")
        self._session.raise_doom()
        self._settle()
        if self._is_local:
            raise UsageError("engine.step within engine.no_sync: the step would be another on each rank; go out first")
        if not self.awaits_step and self.loss_scaler.scale / self.accumulation != 1 and self._has_gradients(optimizer):
            raise UsageError("gradients that engine.backward did not make: call it, or engine.scale(loss).backward()")
        self._was_applied = False
        self.pending += self.awaits_step
        self.awaits_step = False
        if is_last := self.is_gradient_accumulation_boundary():
            with self.monitor.timed("step"):
                counts = reduce_among_replicas(optimizer)
                overflow = not self._scaled_back(optimizer)
                self._was_applied = not overflow
                if not overflow:
                    optimizer.step()
                    if self.lr_scheduler is not None:
                        self.lr_scheduler.step()
                    if self._undecided is not None:
                        self._undecided.has_stepped()
                self._skipped_steps += overflow
                self.loss_scaler.update(overflow=overflow)
                self.zero_grad()
            self.global_steps += 1
            self.monitor.after_step(self)
        self.micro_steps += 1
        if is_last and counts:
            self._checkpoints.after_step()

    def _scaled_back(self, optimizer: Optimizer) -> bool:
        """Take the loss scale off the gradients and clip them; False if they have overflowed."""
        gradients = Gradients(p for group in optimizer.param_groups for p in group["params"])
        scale, limit = self.loss_scaler.scale, self.gradient_clipping()
        norm = gradients.norm() / scale
        self._norm = Later(norm, self._session.raise_doom)
        if self._skips_overflows():
            is_left = self._is_left_to(norm.device) and can_take_back(self.lr_scheduler)
            if is_left and leaves_out(optimizer, norm):
                self._undecided = Undecided(self._norm, cast(AdamW, optimizer), self.lr_scheduler)
            elif not math.isfinite(float(self._norm)):
                self._tell_skipped(self.global_steps + 1)
                return False
        if limit:
            ratio = limit / (norm + 1e-6)
            gradients.scale(torch.where(ratio < 1, ratio, 1.0) / scale)
        else:
            gradients.scale(1 / scale)
        return True

    def _is_left_to(self, device: torch.device) -> bool:
        """Whether a device decides for itself whether it skips a step: the next loss scale is the host's to know."""
        return device.type == "cuda" and not self.config.keys.fp16.enabled

    def _tell_skipped(self, step: int) -> None:
        if not self.config.keys.fp16.enabled and self.ranks.rank == 0:
            norm = self.get_global_grad_norm()
            log.warning("step %d is skipped: the norm of its gradients is %s", step, norm)

    def _settle(self) -> None:
        """Take back what was done with a step that the device has left out."""
        undecided, self._undecided = self._undecided, None
        if undecided is not None and undecided.was_left_out():
            self._was_applied = False
            self._skipped_steps += 1
            self._tell_skipped(self.global_steps)

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out, as their gradients had overflowed."""
        self._settle()
        return self._skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._undecided, self._skipped_steps = None, count

    def _has_gradients(self, optimizer: Optimizer) -> bool:
        return not self.pending and any(p.grad is not None for g in optimizer.param_groups for p in g["params"])

    def _skips_overflows(self) -> bool:
        """Whether a step whose gradients are not finite is left out, as it is by DeepSpeed."""
        keys = self.config.keys
        return keys.fp16.enabled or (keys.bf16.check_grad_overflow if keys.bf16.enabled else self.zero_optimization())

    def was_step_applied(self) -> bool:
        """Whether the last call of `step` changed the parameters."""
        self._settle()
        return self._was_applied

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            for parameter in group["params"]:
                parameter.grad = None
        self.pending, self.awaits_step = 0, False

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save everything that training needs to go on, at any number of ranks and any stage. All ranks must call it.

        Within a step, after one of its micro-batches, the gradients so far are saved too. Files are written while
        training goes on, from a snapshot in `checkpoint.memory_limit` bytes of the host's memory at most; what is more
        is written before this returns. With `checkpoint.asynchronous` false, all of it is.

        Args:
            save_dir: the folder of this run's checkpoints, which all ranks see.
            tag: the name of this one; `global_step` and the number of steps, by default.
            client_state: what is to come back from `load_checkpoint`, of values that JSON has: at stage 3 to each rank
                its own, and to one that was not there the first rank's; at stages 0 to 2 the first rank's to all.
            save_latest: whether `load_checkpoint` without a tag takes this one.
            exclude_frozen_parameters: leave out parameters that are not trained; load with `load_module_strict=False`.

        Returns:
            True.

        Raises:
            CheckpointError: it cannot be written; those saved before are still there. What goes wrong later, while
                files are written, is raised on all ranks by the next call that saves, loads or waits.
            UsageError: it is between `backward` and `step`; or there is no save_dir.
            PeerError: the ranks cannot go on; nothing is saved.
        """
        self._session.raise_doom()
        self._settle()
        if not save_dir:
            raise UsageError("save_checkpoint needs save_dir=: the folder of this run's checkpoints")
        return self._checkpoints.save(
            Path(save_dir), tag, client_state or {}, is_latest=save_latest, frozen=not exclude_frozen_parameters
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on where a checkpoint was saved: by this engine, or by DeepSpeed at stage 1, 2 or 3. All ranks must call
        it.

        Args:
            load_dir: the folder of a run's checkpoints.
            tag: which of them; the latest, by default.
            load_module_strict: whether the names of model and checkpoint must be the same.
            load_optimizer_states: whether the optimizer's state and the loss scale are loaded.
            load_lr_scheduler_states: whether the scheduler goes on, too.
            load_module_only: load parameters and buffers, and nothing else.

        Returns:
            The folder it was in, and its client_state; None and None where there is none.

        Raises:
            CheckpointError: it is damaged, or does not fit.
        """
        parts = Parts(
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            module_only=load_module_only,
            strict=load_module_strict,
        )
        return self._checkpoints.load(Path(load_dir), tag, parts)

    def wait_for_checkpoint(self) -> None:
        """Wait until a checkpoint that is written meanwhile is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self._checkpoints.wait()

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors") -> bool:
        """Save the whole model in the dtype to compute in as one safetensors file. All ranks must call it.

        Returns:
            False where nothing was saved: at stage 3 it takes `stage3_gather_16bit_weights_on_model_save`.

        Raises:
            UsageError: the file would not be safetensors.
            CheckpointError: it cannot be written.
        """
        return save_16bit(self, Path(save_dir), save_filename)

    save_fp16_model = save_16bit_model

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The model's state dict: of a sharded parameter a DTensor, whose `full_tensor()` gathers it.

        Args:
            exclude_frozen_parameters: leave out parameters that are not trained.
        """
        parameters = self.module.named_parameters(remove_duplicate=False) if exclude_frozen_parameters else ()
        frozen = {name for name, parameter in parameters if not parameter.requires_grad}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}

    def load_module_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, custom_load_fn: Any = None
    ) -> None:
        """Take a model's state dict, of whole tensors or of DTensors, on every rank.

        Args:
            strict: whether the names must be the model's.
            custom_load_fn: called as `custom_load_fn(src=state_dict, dst=model)` in the place of the model's own.

        Raises:
            StateDictError: it does not fit; nothing was loaded.
        """
        if custom_load_fn is not None:
            custom_load_fn(src=state_dict, dst=self.module)
        else:
            self.module.load_state_dict(state_dict, strict=strict)

    def export(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Save the model for transformers: its configuration, and safetensors of at most 5 GB. All ranks must call it.

        Args:
            folder: where to.
            tokenizer: one of transformers, or a folder that has a tokenizer's files; both are copied there.

        Raises:
            CheckpointError: it cannot be written.
        """
        export(self, Path(folder), tokenizer)

    def empty_partition_cache(self) -> None:
        """Let go of whole parameters that are kept from one micro-batch to the next."""
        self._session.forget_copies()

    def destroy(self) -> None:
        """Let go of what the engine holds beside the model: waits for a checkpoint, writes the last step's numbers, and
        forgets the gradients.

        Raises:
            CheckpointError: it could not be written.
        """
        self._checkpoints.close()
        if self._session.doom is None:
            self._settle()
        self.monitor.write_rest()
        self.zero_grad()
        self.empty_partition_cache()
