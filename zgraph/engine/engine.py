"""A model, its optimizer and its schedule behind one object: DeepSpeed's engine, wired to the compiler."""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torch.utils.data import Dataset

import zgraph
from zgraph.api import compiled_model
from zgraph.engine.checkpoint import Checkpoints, Parts
from zgraph.engine.config import Config, read_config
from zgraph.engine.data import EngineLoader
from zgraph.engine.export import export, save_16bit
from zgraph.engine.gradients import Gradients
from zgraph.engine.monitoring import Monitoring
from zgraph.engine.ranks import Ranks
from zgraph.engine.scaling import LossScale
from zgraph.engine.schedules import Scheduler
from zgraph.errors import UsageError

log = logging.getLogger("zgraph")

MakeScheduler = Callable[[Optimizer], Any]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Engine:
    """What `zgraph.initialize_engine` returns. Whatever it does not have itself, it has from the model.

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
        self.global_steps = self.micro_steps = self.skipped_steps = 0
        self._is_local = False
        self.ranks = Ranks(compiled_model(model).session.store.group)
        self._checkpoints = Checkpoints(self)
        self._norm: float | None = None
        self._loss: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
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

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """Add the gradients of a micro-batch: of its share in the mean of all micro-batches of a step.

        Args:
            loss: a scalar; the mean over the micro-batch.
            retain_graph: must be False: the step's memory is freed as the backward goes.

        Returns:
            The loss, without its scale.

        Raises:
            UsageError: there is no optimizer, or the loss is no scalar.
        """
        self._needs_optimizer("backward")
        if retain_graph:
            raise UsageError("retain_graph: the compiled backward frees what the forward kept; call the model again")
        if loss.numel() != 1:
            raise UsageError(f"the loss must be one number, not a tensor of shape {tuple(loss.shape)}")
        with self._syncing(), self.monitor.backward(loss):
            torch.autograd.backward(loss.float() * (self.loss_scaler.scale / self.accumulation))
        self._loss = loss.detach()
        return loss

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand is the last of its step."""
        return (self.micro_steps + 1) % self.accumulation == 0

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
        return contextlib.nullcontext() if syncs or not self.module.training else zgraph.no_sync(self.module)

    def step(self) -> None:
        """End a micro-batch; the last of a step updates the parameters, and forgets the gradients.

        With `fp16`, a step whose gradients overflow on any rank is skipped on all.

        Raises:
            UsageError: there is no optimizer, or it is under `no_sync`.
            FloatingPointError: gradients overflow at the smallest loss scale.
        """
        optimizer = self._needs_optimizer("step")
        if self._is_local:
            raise UsageError("engine.step within engine.no_sync: the step would be another on each rank; go out first")
        if self.is_gradient_accumulation_boundary():
            with self.monitor.timed("step"):
                overflow = not self._scaled_back(optimizer)
                if not overflow:
                    optimizer.step()
                    if self.lr_scheduler is not None:
                        self.lr_scheduler.step()
                self.skipped_steps += overflow
                self.loss_scaler.update(overflow=overflow)
                self.zero_grad()
            self.global_steps += 1
            self.monitor.after_step(self)
        self.micro_steps += 1

    def _scaled_back(self, optimizer: Optimizer) -> bool:
        """Take the loss scale off the gradients and clip them; False if they have overflowed."""
        gradients = Gradients(p for group in optimizer.param_groups for p in group["params"])
        scale, limit = self.loss_scaler.scale, self.gradient_clipping()
        self._norm = gradients.norm() / scale
        if self.config.keys.fp16.enabled and not torch.tensor(self._norm).isfinite():
            return False
        factor = min(1.0, limit / (self._norm + 1e-6)) / scale if limit else 1 / scale
        if factor != 1:
            gradients.scale(factor)
        return True

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def _needs_optimizer(self, what: str) -> Optimizer:
        if self.optimizer is None:
            raise UsageError(f"engine.{what} needs an optimizer: name one in the configuration, or give optimizer=")
        return self.optimizer

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, save_dir: str | Path, tag: object = None, client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:  # fmt: skip
        """Save everything that training needs to go on, at any number of ranks and any stage. All ranks must call it.

        Args:
            save_dir: the folder of this run's checkpoints, which all ranks see.
            tag: the name of this one; `global_step` and the number of steps, by default.
            client_state: what is to come back from `load_checkpoint`: the first rank's, of values that JSON has.
            save_latest: whether `load_checkpoint` without a tag takes this one.

        Returns:
            True.

        Raises:
            CheckpointError: it cannot be written; those saved before are still there. With `checkpoint.asynchronous`,
                what goes wrong later is raised by the next call that saves, loads or waits.
            UsageError: a step is under way, whose gradients would be lost.
        """
        return self._checkpoints.save(Path(save_dir), tag, client_state or {}, is_latest=save_latest)

    def load_checkpoint(
        self, load_dir: str | Path, tag: object = None, load_module_strict: bool = True,
        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
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
            scheduler=load_lr_scheduler_states and not load_module_only, module_only=load_module_only,
            strict=load_module_strict,
        )  # fmt: skip
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

    def export(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Save the model for transformers: its configuration, and safetensors of at most 5 GB. All ranks must call it.

        Args:
            folder: where to.
            tokenizer: one of transformers, or a folder that has a tokenizer's files; both are copied there.

        Raises:
            CheckpointError: it cannot be written.
        """
        export(self, Path(folder), tokenizer)

    # --- what can be asked -------------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """The 2-norm of all gradients in the last step, before they were clipped; None before the first."""
        return self._norm

    def get_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self._needs_optimizer("get_lr").param_groups]

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

    def train_batch_size(self) -> int:
        """Rows of a step, of all ranks."""
        return self.config.micro_batch * self.accumulation * self.config.world_size

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
        """Ranks that share a batch."""
        return self.config.world_size

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


def initialize_engine(
    args: Any = None, model: nn.Module | None = None, optimizer: Optimizer | MakeOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None, training_data: Dataset[Any] | None = None,
    lr_scheduler: Any | MakeScheduler | None = None, collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None, mesh: DeviceMesh | None = None,
    dist_init_required: bool | None = None, config_params: Mapping[str, Any] | str | Path | None = None,
) -> tuple[Engine, Optimizer | None, EngineLoader | None, Any]:  # fmt: skip
    """Compile a model for training as a DeepSpeed configuration says.

    Without a process group, one is made where a launcher (torchrun) has said how many ranks there are.

    Args:
        args: as DeepSpeed takes them; only `deepspeed_config`, a path, is read, where `config` is not given.
        model: the model; it is compiled in place.
        optimizer: an optimizer over the model's parameters as they are, which then takes those that are sharded; or a
            function from parameters to one. It goes before the configuration's.
        model_parameters: parameters, or groups of them, for the configuration's optimizer; by default all.
        training_data: a dataset with a length.
        lr_scheduler: a scheduler of the optimizer, or a function from the optimizer to one.
        collate_fn: for the training data, as torch's DataLoader takes it.
        config: a mapping, the path of a JSON file, or JSON in base64.
        dist_init_required: False leaves it to the script to make a process group.
        config_params: another name for `config`.
        mesh: the ranks, as `zgraph.compile` takes them; by default all, in rows of `zero_hpz_partition_size`.

    Returns:
        The engine, its optimizer, a loader of the training data, and the scheduler; None for what there is not.

    Raises:
        ConfigError: the configuration is wrong; the error has all problems.
        UsageError: the model, or what else was given, does not fit.
    """
    if model is None:
        raise UsageError("initialize_engine needs model=")
    given = (config, config_params, getattr(args, "deepspeed_config", None))
    source = next((found for found in given if found is not None), None)
    if source is None:
        raise UsageError("initialize_engine needs config=: a dict, a path, or JSON in base64")
    if dist_init_required is not False:
        init_distributed()
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    read = read_config(source, world_size=everyone if mesh is None else mesh.size())
    if _rank(mesh) == 0:
        for note in read.notes:
            log.warning(note)
    if optimizer is None and read.optimizer is None and (lr_scheduler is not None or read.schedule is not None):
        raise UsageError("a scheduler needs an optimizer: name one in the configuration, or give optimizer=")
    loader = None
    if training_data is not None:
        loader = EngineLoader(
            training_data, read.micro_batch, collate_fn, read.keys.dataloader_drop_last, read.keys.seed or 0,
            read.world_size, _rank(mesh),
        )  # fmt: skip
    groups = _named_groups(model, optimizer, model_parameters)
    with _emptied(optimizer) if isinstance(optimizer, Optimizer) else contextlib.nullcontext():
        compiled = compile_for(model, read, mesh)
    made = _optimizer(compiled, read, optimizer, groups)
    scheduler = _scheduler(made, read, lr_scheduler)
    return Engine(compiled, read, made, scheduler, loader), made, loader, scheduler


initialize = initialize_engine


def _rank(mesh: DeviceMesh | None) -> int:
    """This rank's number among those that share a batch."""
    if mesh is not None:
        return int((mesh.mesh.flatten() == dist.get_rank()).nonzero().item())
    return dist.get_rank() if dist.is_initialized() else 0


def init_distributed(dist_backend: str | None = None) -> None:
    """Join the ranks that a launcher (torchrun) has started; nothing where there is one, or where that is done.

    Args:
        dist_backend: by default NCCL on GPUs and gloo on processors.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(dist_backend or ("nccl" if torch.cuda.is_available() else "gloo"))


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add what DeepSpeed's scripts take on their command line: `--deepspeed`, `--deepspeed_config`, `--local_rank`."""
    group = parser.add_argument_group("zgraph", "configuration")
    group.add_argument("--deepspeed", action="store_true", help="taken, and without effect: zgraph is always on")
    group.add_argument("--deepspeed_config", help="path of the JSON configuration")
    group.add_argument("--local_rank", type=int, default=0, help="given by launchers; read from the environment")
    return parser


def compile_for(model: nn.Module, config: Config, mesh: DeviceMesh | None = None) -> nn.Module:
    """Compile a model, in place, as a configuration says.

    Args:
        mesh: the ranks; by default all, in rows of `zero_hpz_partition_size`.
    """
    keys, own = config.keys, config.keys.zgraph
    param_dtype = getattr(torch, config.param_dtype) if config.param_dtype is not None else None
    if param_dtype is not None:
        model.float()  # masters
    if torch.cuda.is_available() and not any(p.is_meta for p in model.parameters()):
        model.to(torch.device("cuda", torch.cuda.current_device()))
    recipe = {} if own.recipe is None else {"passes": own.recipe}
    return zgraph.compile(
        model, stage=_stage(model, config), mesh=mesh if mesh is not None else _mesh(config), param_dtype=param_dtype,
        reduce_dtype=_DTYPES[keys.communication_data_type], hardware=own.hardware, memory_budget=own.memory_budget,
        recompute=own.recompute, offload=_offload(config), kernels=own.kernels, save=own.save, fullgraph=own.fullgraph,
        dynamic=own.dynamic, **recipe,
    )  # fmt: skip


_DTYPES = {
    None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64,
}  # fmt: skip


def _stage(model: nn.Module, config: Config) -> Any:
    """The stage; parameters below the threshold of stage 3 stay whole."""
    zero = config.keys.zero_optimization
    if zero.stage != 3 or not zero.stage3_param_persistence_threshold:
        return zero.stage
    small = {n for n, p in model.named_parameters() if p.numel() < zero.stage3_param_persistence_threshold}
    return lambda name: 0 if name in small else 3


def _offload(config: Config) -> Any:
    """What goes to the host, as `zgraph.compile` takes it."""
    zero, keys = config.keys.zero_optimization, config.keys
    asked = {
        "parameters": zero.offload_param.device != "none" and zero.stage == 3,
        "optimizer": zero.offload_optimizer.device == "cpu" and zero.stage > 0,
        "activations": keys.activation_checkpointing.cpu_checkpointing,
    }
    return tuple(name for name, is_asked in asked.items() if is_asked) or "auto"


def _mesh(config: Config) -> DeviceMesh | None:
    """Rows of `zero_hpz_partition_size` ranks that shard, and copies of them."""
    size = config.keys.zero_optimization.zero_hpz_partition_size
    if size in (1, config.world_size):
        return None
    if config.world_size % size:
        raise UsageError(f"zero_hpz_partition_size: {config.world_size} ranks are no multiple of {size}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (config.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def _named_groups(model: nn.Module, optimizer: Any, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """The groups of parameters that were given, with the parameters' names: compiling makes others of them."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups: list[Any] = []
    if isinstance(optimizer, Optimizer):
        groups = optimizer.param_groups
    elif model_parameters is not None:
        groups = list(model_parameters)
        groups = groups if groups and isinstance(groups[0], Mapping) else [{"params": groups}]
    found = []
    for group in groups:
        members = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if any(id(p) not in names for p in members):
            raise UsageError("an optimizer's parameter, or one of model_parameters, is not the model's")
        found.append({**group, "params": [names[id(p)] for p in members]})
    return found


@contextlib.contextmanager
def _emptied(optimizer: Optimizer) -> Iterator[None]:
    """Without its parameters, while compiling makes others of them; with them again if that fails."""
    if optimizer.state:
        raise UsageError("the optimizer has made steps already: give a new one, and load its state afterwards")
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    try:
        yield
    except BaseException:
        optimizer.param_groups.extend(groups)
        raise


def _optimizer(model: nn.Module, config: Config, optimizer: Any, groups: list[dict[str, Any]]) -> Optimizer | None:
    parameters = dict(model.named_parameters())
    taken: list[Any] = [{**g, "params": [parameters[n] for n in g["params"]]} for g in groups]
    if isinstance(optimizer, Optimizer):
        for group in taken:
            optimizer.add_param_group(group)
        return optimizer
    taken = taken or list(parameters.values())
    if callable(optimizer):
        made: Optimizer = optimizer(taken)
        return made
    if config.optimizer is None:
        return None
    offload = config.keys.zero_optimization.offload_optimizer
    folder = offload.nvme_path if offload.device == "nvme" else None
    return config.optimizer.make(taken, folder=folder)


def _scheduler(optimizer: Optimizer | None, config: Config, given: Any) -> Any:
    if optimizer is None:
        return None
    if given is None:
        return Scheduler(optimizer, config.schedule) if config.schedule is not None else None
    return given(optimizer) if callable(given) and not hasattr(given, "step") else given
