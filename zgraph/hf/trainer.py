"""Any class of Hugging Face's Trainer over zgraph: what it trains is compiled and sharded, all else is its own."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers.trainer import TRAINER_STATE_NAME

from zgraph import optim
from zgraph.engine.checkpoint.tensors import whole_state_dict
from zgraph.engine.config.lr_schedules import Scheduler
from zgraph.engine.config.optimizers import handed_over
from zgraph.engine.config.read import Config, read_config
from zgraph.engine.gradients import Gradients
from zgraph.engine.initialize import compile_for
from zgraph.environment import environment
from zgraph.errors import ConfigError, UsageError
from zgraph.hf.accelerators import own
from zgraph.hf.arguments import Arguments, enabled
from zgraph.hf.config import filled, without_effect
from zgraph.hf.data_ranks import by_data_ranks, draws_as_first, seeded_by_data_rank
from zgraph.hf.grad_scaler import Scaler
from zgraph.hf.parallelism import unseen
from zgraph.hf.state import is_complete, load_state, save_state
from zgraph.options.validate import ATTRIBUTE

log = logging.getLogger("zgraph")

Base: Any = object  # the methods are those of transformers.Trainer, which `enable` puts behind this class

T = TypeVar("T")

DEFAULT = {"zero_optimization": {"stage": 3}}
STATE = "zgraph"
"""The folder of the optimizer's state within a checkpoint."""
SCHEDULER = "scheduler.pt"
_STEP = re.compile(r"checkpoint-\d+")


class Sharded(Base):  # type: ignore[misc]
    """Class that `enable` puts before a Trainer class. The model is compiled in place when it is first needed.

    Args:
        args, kwargs: as the Trainer takes them.
        zgraph: a DeepSpeed-style configuration: a mapping, the path of a JSON file, or JSON in base64. By default
            `deepspeed` of `zgraph.hf.TrainingArguments`, else what ZGRAPH_CONFIG names, else stage 3.

    Raises:
        ConfigError: the configuration or TrainingArguments ask for what cannot be; the error has all problems.
    """

    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: Any

    def __init__(self, *args: Any, zgraph: Mapping[str, Any] | str | Path | None = None, **kwargs: Any) -> None:
        self.zgraph_source: Any = zgraph
        self.evaluated, self.sharing = ("", 0), 1
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        _check(self.args)
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # else torch's DataParallel
        self.zgraph_source = _source(self.zgraph_source, self.args)
        self.zgraph_config = self._read()
        if self.zgraph_config.expert_parallel > 1 and not self.args.average_tokens_across_devices:
            raise ConfigError(
                [
                    "average_tokens_across_devices=False: ranks that share experts have one loss of all their tokens, "
                    "which is not to be divided by a rank's own number; leave it True"
                ]
            )
        told = without_effect(filled(self.zgraph_source, self.args), self.zgraph_config.notes)
        if told and self.args.process_index == 0:
            log.warning(told)
        with unseen():
            super().create_accelerator_and_postprocess()
        self._count_data_ranks(self.zgraph_config.alike)
        if self.zgraph_config.keys.fp16.enabled:
            self.accelerator.scaler = Scaler(self.zgraph_config.keys.fp16)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        found = {**super()._build_accelerator_args(**kwargs), "mixed_precision": "no"}  # the graph has its own
        found.pop("parallelism_config", None)  # `filled` has read it
        return found

    def _read(self, num_steps: int | None = None) -> Config:
        config = filled(self.zgraph_source, self.args, num_steps=num_steps)
        return read_config(config, world_size=self.args.world_size)

    # --- ranks that share a batch ------------------------------------------------------------------------------------

    def _count_data_ranks(self, alike: int) -> None:
        """Have loaders, gathers and counts be of the ranks that each have a batch of their own."""
        if alike > 1 and getattr(self.args, "train_sampling_strategy", "") == "batch_rebalance":
            raise ConfigError(
                [
                    'train_sampling_strategy: "batch_rebalance" gives each rank rows of its own; take another where '
                    "ranks compute together"
                ]
            )
        by_data_ranks(self.accelerator, alike)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        return seeded_by_data_rank(loader, self.accelerator) if self.zgraph_config.alike > 1 else loader

    def get_total_train_batch_size(self, args: Any) -> int:
        rows: int = self._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        return rows

    def floating_point_ops(self, inputs: Any) -> float:
        return float(super().floating_point_ops(inputs)) / self.zgraph_config.alike

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        has_labels = self.label_smoother is not None and "labels" in inputs
        if self.compute_loss_func is None and not has_labels:  # the model's own, of all that share its experts
            self.sharing = self.zgraph_config.expert_parallel
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.sharing = 1

    def get_tp_size(self) -> int:
        """Ranks that have one loss: it is multiplied by those that have one of their own."""
        return int(super().get_tp_size()) * self.sharing

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(self._with_speed(logs), *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict(*args, **kwargs)
        self._with_speed(output.metrics)
        return output

    def _with_speed(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of an evaluation, with its steps in a second those of the ranks that have batches of their own."""
        prefix, num_samples = self.evaluated
        if self.zgraph_config.alike > 1 and metrics.get(f"{prefix}_steps_per_second"):
            num_steps = math.ceil(num_samples / (self.args.eval_batch_size * self.accelerator.num_processes))
            metrics[f"{prefix}_steps_per_second"] = round(num_steps / metrics[f"{prefix}_runtime"], 3)
        return metrics

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        draws_as_first(self.zgraph_config.together)

    # --- the model ---------------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        """Compile the model, unless it is; an optimizer that was given takes the sharded parameters."""
        if ATTRIBUTE not in self.model.__dict__:
            with handed_over(self.optimizer, self.model) if self.optimizer is not None else nullcontext():
                compile_for(self.model, self.zgraph_config)
        own(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if ATTRIBUTE not in model.__dict__ and not any(p.is_meta for p in model.parameters()):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return model

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._compile()
        output = super().evaluation_loop(*args, **kwargs)
        self.evaluated = kwargs.get("metric_key_prefix", "eval"), int(output.num_samples or 0)
        return output

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        count = super()._get_num_items_in_batch(*args, **kwargs)
        return count.long() if isinstance(count, torch.Tensor) else count  # floats are cast to the compute dtype

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        self._compile()
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is None and self.zgraph_config.optimizer is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self.zgraph_config.optimizer.make(trained, folder=self.zgraph_config.state_folder)
        elif self.optimizer is None and given is None:
            self.optimizer_cls_and_kwargs = self._own_adamw()
        try:
            made: Optimizer = super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given
        return made

    def _own_adamw(self) -> tuple[Any, dict[str, Any]]:
        """The optimizer class and options of TrainingArguments, with zgraph's AdamW in place of torch's."""
        folder = self.zgraph_config.state_folder
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if kind is not torch.optim.AdamW or options.keys() - {"lr", "betas", "eps", "weight_decay", "fused", "foreach"}:
            if folder is not None:
                raise UsageError(f'offload_optimizer to "nvme" needs AdamW, not {self.args.optim}')
            return kind, options
        options = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
        place = {} if folder is None else {"state": "disk", "folder": folder}
        return optim.AdamW, {**options, **place}

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        schedule = self._read(num_training_steps).schedule
        if self.lr_scheduler is None and schedule is not None:
            self.lr_scheduler = Scheduler(optimizer or self.optimizer, schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        norm = self._get_grad_norm(model)
        if norm > self.args.max_grad_norm:
            Gradients(model.parameters()).scale(self.args.max_grad_norm / (norm + 1e-6))
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        if grad_norm is not None:
            return grad_norm
        scaler = self.accelerator.scaler
        return float(Gradients(model.parameters()).norm()) if scaler is None else scaler.unscale_(self.optimizer)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete(Path(self.args.output_dir)) or True
        elif resume_from_checkpoint and Path(resume_from_checkpoint).is_dir():
            _check_complete(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # one of that step may be there: it is complete again when its state is, the last
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if dist.is_initialized():
            dist.barrier()  # the first rank goes on to complete the checkpoint

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and ATTRIBUTE in self.model.__dict__:
            state_dict = whole_state_dict(self.model, keep=self.args.should_save)
        super()._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir) / STATE, self.model, _unwrapped(self.optimizer))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if is_complete(folder / STATE):
            load_state(folder / STATE, self.model, _unwrapped(self.optimizer))
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        elif (folder / STATE).is_dir() or (folder / "optimizer.pt").is_file():
            raise UsageError(
                f"{checkpoint} has no state of zgraph's optimizer: it was not written to its end, or by another "
                "Trainer. Resume from another checkpoint, or begin with its weights: from_pretrained, without "
                "resume_from_checkpoint"
            )


@functools.cache
def enable(kind: type[T]) -> type[T]:
    """A Trainer class over zgraph: `MyTrainer = zgraph.hf.enable(MyTrainer)`; or a class of TrainingArguments, whose
    `deepspeed` such a Trainer reads.

    Raises:
        UsageError: it is a class of neither.
    """
    if isinstance(kind, type) and issubclass(kind, transformers.TrainingArguments):
        arguments: Any = kind
        return enabled(arguments)
    if not (isinstance(kind, type) and issubclass(kind, transformers.Trainer)):
        raise UsageError(
            f"zgraph.hf.enable takes a class derived from transformers.Trainer or TrainingArguments, not {kind!r}"
        )
    if issubclass(kind, Sharded):
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Sharded, kind), names)


Trainer: Any = enable(transformers.Trainer)
Trainer.__module__ = __name__  # where pickle finds it


def _source(given: Any, args: Any) -> Any:
    """The configuration: the Trainer's, that of the arguments, the environment's, or stage 3.

    Raises:
        ConfigError: there are two.
    """
    if isinstance(args, Arguments):
        args.is_read = True
    if not isinstance(args, Arguments) or args.deepspeed is None:
        return given if given is not None else environment().config or DEFAULT
    if given is not None:
        raise ConfigError(["zgraph= of the Trainer and deepspeed= of its arguments: give one of them"])
    return args.deepspeed


def _check(args: Any) -> None:
    """Refuse TrainingArguments that zgraph takes the place of."""
    by_package = args.deepspeed and not isinstance(args, Arguments)
    file = "zgraph.hf.TrainingArguments or Trainer(zgraph=...) takes the same file"
    asked = {
        f"deepspeed: zgraph does what it would; {file}": by_package or _launched("DEEPSPEED"),
        "fsdp: zgraph shards; leave it out": args.fsdp or _launched("FSDP"),
        'torch_compile: zgraph compiles; leave it out, "zgraph": {"kernels": "inductor"} in the configuration has '
        "Inductor's kernels": args.torch_compile,
        "fp16_full_eval, bf16_full_eval: evaluation computes as training does; give fp16 or bf16 instead": (
            args.fp16_full_eval or args.bf16_full_eval
        ),
        "auto_find_batch_size: give per_device_train_batch_size; zgraph.plan says what fits": args.auto_find_batch_size,
        "mixed_precision fp8: choose bf16": args.mixed_precision == "fp8",
    }
    if problems := [problem for problem, is_asked in asked.items() if is_asked]:
        raise ConfigError(problems)


def _unwrapped(optimizer: Any) -> Optimizer:
    """Without what Accelerate puts around it."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _last_complete(root: Path) -> str | None:
    """The last checkpoint that was written to its end; None where there is none at all.

    Raises:
        UsageError: none of those that are there was.
    """
    found = {
        int(path.name.rpartition("-")[2]): path for path in root.glob("checkpoint-*") if _STEP.fullmatch(path.name)
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            _check_complete(path)
        except UsageError as error:
            log.warning("%s", error)
        else:
            return str(path)
    if found:
        raise UsageError(f"no checkpoint in {root} was written to its end: train without resume_from_checkpoint")
    return None


def _check_complete(checkpoint: Path) -> None:
    """Raise UsageError if a checkpoint was not written to its end: the Trainer's state comes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{checkpoint} was not written to its end ({error}): resume from another") from None


def _launched(kind: str) -> bool:
    """Whether `accelerate launch` has set this up."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true", "yes")
